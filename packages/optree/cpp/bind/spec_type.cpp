// SPDX-License-Identifier: Apache-2.0
#include "bind/spec_type.h"

#include <new>

#include "support/arguments.h"
#include "walk/compare.h"
#include "walk/compose.h"
#include "walk/flatten_up_to.h"
#include "walk/paths.h"
#include "walk/pickle.h"
#include "walk/repr.h"
#include "walk/transform.h"
#include "walk/unflatten.h"

namespace optree {
namespace {

// Runs `body(spec)`, which returns a Ref, on an initialised spec.
template <class Body>
OPTREE_INLINE PyObject* method(PyObject* self, Body&& body) {
    SpecObject& spec = as_spec(self);
    return guarded(state_of(spec).error(), [&]() -> PyObject* {
        require_initialised(spec);
        return body(spec).release();
    });
}

Ref boolean(bool value) { return Ref::borrow(value ? Py_True : Py_False); }
Ref size(std::uint64_t value) { return checked(PyLong_FromUnsignedLongLong(value)); }

// ---- properties

PyObject* get_num_nodes(PyObject* self, void*) {
    return method(self, [](SpecObject& spec) { return size(spec.tree.num_nodes()); });
}
PyObject* get_num_leaves(PyObject* self, void*) {
    return method(self, [](SpecObject& spec) { return size(spec.tree.leaves); });
}
PyObject* get_num_children(PyObject* self, void*) {
    return method(self, [](SpecObject& spec) { return size(spec.tree.num_children()); });
}
PyObject* get_none_is_leaf(PyObject* self, void*) {
    return method(self, [](SpecObject& spec) { return boolean(spec.none_is_leaf); });
}
PyObject* get_namespace(PyObject* self, void*) {
    return method(self, [](SpecObject& spec) { return Ref::borrow(spec.name); });
}
PyObject* get_type(PyObject* self, void*) {
    return method(self, [](SpecObject& spec) {
        if (spec.tree.nodes.empty()) return Ref::borrow(Py_None);
        const Node& root = spec.tree.root();
        return Ref::borrow(node_type(state_of(spec), root.kind, slots_of(spec.tree, root)));
    });
}
PyObject* get_kind(PyObject* self, void*) {
    return method(self, [](SpecObject& spec) {
        const Kind kind = spec.tree.nodes.empty() ? kLeafKind : spec.tree.root().kind;
        return Ref::borrow(state_of(spec).kinds[static_cast<int>(kind)].get());
    });
}

PyGetSetDef properties[] = {
    {"num_nodes", get_num_nodes, nullptr, "Number of nodes, leaves included.", nullptr},
    {"num_leaves", get_num_leaves, nullptr, "Number of leaves.", nullptr},
    {"num_children", get_num_children, nullptr, "Number of children of the root.", nullptr},
    {"none_is_leaf", get_none_is_leaf, nullptr,
     "Whether None is a leaf (else a node without children).", nullptr},
    {"namespace", get_namespace, nullptr,
     "The registry namespace that custom nodes are resolved in.", nullptr},
    {"type", get_type, nullptr, "The class of the root; None for a leaf.", nullptr},
    {"kind", get_kind, nullptr, "The PyTreeKind of the root.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

// ---- methods of one argument

PyObject* spec_unflatten(PyObject* self, PyObject* leaves) {
    return method(self, [&](SpecObject& spec) {
        const Ref alive = Ref::borrow(self);
        return unflatten_iterable(state_of(spec), view_of(spec.tree), leaves);
    });
}

PyObject* spec_flatten_up_to(PyObject* self, PyObject* tree) {
    return method(self, [&](SpecObject& spec) {
        const Ref alive = Ref::borrow(self);
        Context context(state_of(spec), nullptr, spec.none_is_leaf, spec.name);
        ObjectStack subtrees;
        flatten_up_to(context, view_of(spec.tree), tree, subtrees);
        return subtrees.into_list();
    });
}

template <Ref (*Body)(const SpecObject&, const SpecObject&)>
PyObject* of_two_specs(PyObject* self, PyObject* other) {
    return method(
        self, [&](SpecObject& spec) { return Body(spec, checked_spec(state_of(spec), other)); });
}

Py_ssize_t as_index(PyObject* value) {
    Ref number;
    if (PyIndex_Check(value) != 0) {
        number = checked(calling_python([&] { return PyNumber_Index(value); }));
    } else {
        const PyNumberMethods* methods = Py_TYPE(value)->tp_as_number;
        if (PyFloat_Check(value) || methods == nullptr || methods->nb_int == nullptr) {
            raise(PyExc_TypeError, "expected an integer index, got %R", value);
        }
        number = checked(calling_python([&] { return PyNumber_Long(value); }));
    }
    const Py_ssize_t index = PyLong_AsSsize_t(number.get());
    if (index == -1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw PythonError{};
        PyErr_Clear();
        raise(PyExc_TypeError, "expected an index of the size of a pointer, got %R", number.get());
    }
    return index;
}

template <Ref (*Body)(const SpecObject&, Py_ssize_t)>
PyObject* of_index(PyObject* self, PyObject* index) {
    return method(self, [&](SpecObject& spec) { return Body(spec, as_index(index)); });
}

PyObject* spec_setstate_method(PyObject* self, PyObject* state) {
    SpecObject& spec = as_spec(self);
    return guarded(state_of(spec).error(), [&] {
        const Ref alive = Ref::borrow(self);
        spec_setstate(spec, state);
        return compat::new_ref(Py_None);
    });
}

// ---- methods without arguments

template <Ref (*Body)(const SpecObject&)>
PyObject* of_spec(PyObject* self, PyObject*) {
    return method(self, Body);
}
PyObject* spec_is_one_level(PyObject* self, PyObject*) {
    return method(self, [](SpecObject& spec) {
        const Tree& tree = spec.tree;
        return boolean(!tree.nodes.empty() && tree.num_nodes() == tree.num_children() + 1 &&
                       tree.leaves == tree.num_children());
    });
}
PyObject* spec_getstate_method(PyObject* self, PyObject*) {
    return method(self, [](SpecObject& spec) { return spec_getstate(spec, false); });
}
PyObject* spec_reduce_method(PyObject* self, PyObject*) {
    return method(self, [self](SpecObject&) { return spec_reduce(self, false); });
}
PyObject* spec_reduce_ex(PyObject* self, PyObject*) {
    return method(self, [self](SpecObject&) { return spec_reduce(self, true); });
}
// A shallow copy shares the objects that the nodes hold, but not the nodes.
PyObject* spec_copy(PyObject* self, PyObject*) {
    return method(self, [](SpecObject& spec) { return spec_of_subtree(spec, whole(spec.tree)); });
}

// ---- methods with keywords

using Args = PyObject* const*;

PyObject* spec_is_leaf(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return method(self, [&](SpecObject& spec) {
        PyObject* out[1];
        parse_arguments({"is_leaf", 0, 0, 0, {"strict"}}, args, nargs, kwnames, out);
        const bool strict = out[0] == nullptr || as_bool(out[0], "strict");
        return boolean(spec.tree.num_nodes() == 1 && (!strict || spec.tree.leaves == 1));
    });
}

Ref is_prefix(SpecObject& spec, const char* function, bool suffix, Args args, Py_ssize_t nargs,
              PyObject* kwnames) {
    PyObject* out[2];
    parse_arguments({function, 1, 1, 1, {"other", "strict"}}, args, nargs, kwnames, out);
    const SpecObject& other = checked_spec(state_of(spec), out[0]);
    const bool strict = as_bool(out[1], "strict");
    return boolean(suffix ? spec_is_prefix(other, spec, strict)
                          : spec_is_prefix(spec, other, strict));
}
PyObject* spec_is_prefix_method(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return method(self, [&](SpecObject& spec) {
        return is_prefix(spec, "is_prefix", false, args, nargs, kwnames);
    });
}
PyObject* spec_is_suffix_method(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return method(self, [&](SpecObject& spec) {
        return is_prefix(spec, "is_suffix", true, args, nargs, kwnames);
    });
}

PyObject* spec_transform_method(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return method(self, [&](SpecObject& spec) {
        PyObject* out[2];
        parse_arguments({"transform", 0, 2, 0, {"f_node", "f_leaf"}}, args, nargs, kwnames, out);
        const Ref alive = Ref::borrow(self);
        return spec_transform(spec, as_predicate(out[0], "f_node"), as_predicate(out[1], "f_leaf"));
    });
}
PyObject* spec_traverse_method(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return method(self, [&](SpecObject& spec) {
        PyObject* out[3];
        parse_arguments({"traverse", 1, 3, 1, {"leaves", "f_node", "f_leaf"}}, args, nargs, kwnames,
                        out);
        const Ref alive = Ref::borrow(self);
        return spec_traverse_leaves(spec, out[0], as_predicate(out[1], "f_node"),
                                    as_predicate(out[2], "f_leaf"));
    });
}
PyObject* spec_walk_method(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return method(self, [&](SpecObject& spec) {
        PyObject* out[3];
        parse_arguments({"walk", 1, 3, 1, {"leaves", "f_node", "f_leaf"}}, args, nargs, kwnames,
                        out);
        const Ref alive = Ref::borrow(self);
        return spec_walk(spec, out[0], as_predicate(out[1], "f_node"),
                         as_predicate(out[2], "f_leaf"));
    });
}

PyMethodDef methods[] = {
    {"unflatten", spec_unflatten, METH_O, "Rebuild a tree from its leaves."},
    {"flatten_up_to", spec_flatten_up_to, METH_O, "The subtrees of a tree at the leaf positions."},
    {"broadcast_to_common_suffix", of_two_specs<spec_broadcast>, METH_O,
     "The smallest structure that both are prefixes of."},
    {"compose", of_two_specs<spec_compose>, METH_O, "Replace every leaf by a structure."},
    {"transform", as_cfunction(spec_transform_method), kKeywords,
     "Apply functions to the nodes and leaves."},
    {"traverse", as_cfunction(spec_traverse_method), kKeywords,
     "Rebuild a tree, passing leaves and containers through functions."},
    {"walk", as_cfunction(spec_walk_method), kKeywords,
     "Fold leaves upwards without building containers."},
    {"paths", of_spec<spec_paths>, METH_NOARGS, "The path to each leaf, as tuples of entries."},
    {"accessors", of_spec<spec_accessors>, METH_NOARGS, "The accessor of each leaf."},
    {"entries", of_spec<spec_entries>, METH_NOARGS, "The entries of the root."},
    {"entry", of_index<spec_entry>, METH_O, "The entry of the root that leads to one child."},
    {"children", of_spec<spec_children>, METH_NOARGS,
     "The structures of the children of the root."},
    {"child", of_index<spec_child>, METH_O, "The structure of one child of the root."},
    {"one_level", of_spec<spec_one_level>, METH_NOARGS,
     "The root with leaves for children; None for a leaf."},
    {"is_leaf", as_cfunction(spec_is_leaf), kKeywords,
     "Whether the tree is one leaf (or, not strictly, one node)."},
    {"is_one_level", spec_is_one_level, METH_NOARGS,
     "Whether all children of the root are leaves."},
    {"is_prefix", as_cfunction(spec_is_prefix_method), kKeywords,
     "Whether this structure is a prefix of another."},
    {"is_suffix", as_cfunction(spec_is_suffix_method), kKeywords,
     "Whether another structure is a prefix of this one."},
    {"__getstate__", spec_getstate_method, METH_NOARGS, nullptr},
    {"__setstate__", spec_setstate_method, METH_O, nullptr},
    {"__reduce__", spec_reduce_method, METH_NOARGS, nullptr},
    {"__reduce_ex__", spec_reduce_ex, METH_O, nullptr},
    {"__copy__", spec_copy, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// ---- slots

PyObject* spec_new(PyTypeObject* type, PyObject*, PyObject*) {
    State* state = nullptr;
    try {
        state = &state_of_type(type);
    } catch (const PythonError&) {
        return nullptr;
    }
    PyObject* self = type->tp_alloc(type, 0);
    if (self == nullptr) return nullptr;
    SpecObject& spec = as_spec(self);
    new (&spec.tree) Tree;
    spec.state = compat::new_ref(reinterpret_cast<PyObject*>(state));
    spec.name = compat::new_ref(state->empty_str.get());
    return self;
}

int spec_init(PyObject*, PyObject*, PyObject*) {
    PyErr_SetString(PyExc_TypeError, "optree.PyTreeSpec: No constructor defined!");
    return -1;
}

PyObject* spec_repr_slot(PyObject* self) {
    const SpecObject& spec = as_spec(self);
    return guarded(state_of(spec).error(), [&] { return spec_repr(spec).release(); });
}

Py_hash_t spec_hash_slot(PyObject* self) {
    SpecObject& spec = as_spec(self);
    try {
        require_initialised(spec);
        return spec_hash(spec);
    }
    OPTREE_RETHROW_THREAD_EXIT catch (...) {
        set_from_current_exception(state_of(spec).error());
        return -1;
    }
}

Py_ssize_t spec_length(PyObject* self) {
    const std::uint64_t leaves = as_spec(self).tree.leaves;
    if (leaves <= std::uint64_t{PY_SSIZE_T_MAX}) return static_cast<Py_ssize_t>(leaves);
    PyErr_SetString(PyExc_OverflowError, "the number of leaves exceeds sys.maxsize");
    return -1;
}

PyObject* spec_compare(PyObject* self, PyObject* other, int op) {
    State& state = state_of(as_spec(self));
    if (!is_spec(state, other)) Py_RETURN_NOTIMPLEMENTED;
    return method(self, [&](SpecObject& a) {
        const SpecObject& b = checked_spec(state, other);
        const Ref alive_a = Ref::borrow(self);
        const Ref alive_b = Ref::borrow(other);
        switch (op) {
            case Py_EQ: return boolean(spec_equal(a, b));
            case Py_NE: return boolean(!spec_equal(a, b));
            case Py_LT: return boolean(spec_is_prefix(a, b, true));
            case Py_LE: return boolean(spec_is_prefix(a, b, false));
            case Py_GT: return boolean(spec_is_prefix(b, a, true));
            default: return boolean(spec_is_prefix(b, a, false));
        }
    });
}

PyMemberDef members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(SpecObject, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

const char kDoc[] = "The structure of a tree: everything but its leaves.";

PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(spec_new)},
    {Py_tp_init, reinterpret_cast<void*>(spec_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(spec_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(spec_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(spec_clear)},
    {Py_tp_repr, reinterpret_cast<void*>(spec_repr_slot)},
    {Py_tp_hash, reinterpret_cast<void*>(spec_hash_slot)},
    {Py_tp_richcompare, reinterpret_cast<void*>(spec_compare)},
    {Py_sq_length, reinterpret_cast<void*>(spec_length)},
    {Py_tp_getset, properties},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_doc, const_cast<char*>(kDoc)},
    {0, nullptr},
};

PyType_Spec type_spec = {
    "optree.PyTreeSpec",
    sizeof(SpecObject),
    0,
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_BASETYPE |
                              compat::kImmutableType),
    slots,
};

}  // namespace

Ref make_spec_type() { return checked(PyType_FromSpec(&type_spec)); }

}  // namespace optree
