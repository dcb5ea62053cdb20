// SPDX-License-Identifier: Apache-2.0
#include "walk/iterate.h"

#include "support/arguments.h"

#include <new>
#include <utility>
#include <vector>

namespace optree {
namespace {

struct Pending {
    PyObject* object;  // owned
    int depth;
};

struct IterObject {
    PyObject_HEAD
    PyObject* weakrefs;
    PyObject* state;      // owned, like the members below
    PyObject* predicate;  // null for none
    PyObject* name;
    bool none_is_leaf;
    bool sorted;                  // the dict mode when the iterator was created
    Turn turn;                    // held while the next leaf is searched
    std::vector<Pending> agenda;  // objects still to visit, the next one last
    PyTypeObject* leaf_type;      // owned, or null: instances were leaves at that version
    std::uint64_t registry_version;
};

IterObject& as_iter(PyObject* object) noexcept { return *reinterpret_cast<IterObject*>(object); }

int iter_traverse(PyObject* self, visitproc visit, void* arg) {
    const IterObject& iter = as_iter(self);
    OPTREE_VISIT_TYPE(self);
    Py_VISIT(iter.state);
    Py_VISIT(iter.predicate);
    Py_VISIT(iter.leaf_type);
    for (const Pending& pending : iter.agenda) Py_VISIT(pending.object);
    return 0;
}

int iter_clear(PyObject* self) {
    IterObject& iter = as_iter(self);
    std::vector<Pending> dropped;
    dropped.swap(iter.agenda);
    PyObject* predicate = iter.predicate;
    iter.predicate = nullptr;
    Py_XDECREF(predicate);
    Py_CLEAR(iter.leaf_type);
    for (const Pending& pending : dropped) Py_DECREF(pending.object);
    return 0;
}

void iter_dealloc(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    // The tree may hold iterators in turn, nested deeper than the C stack allows.
    Py_TRASHCAN_BEGIN(self, iter_dealloc);
    IterObject& iter = as_iter(self);
    if (iter.weakrefs != nullptr) PyObject_ClearWeakRefs(self);
    iter_clear(self);
    iter.agenda.~vector();
    iter.turn.~Turn();
    Py_XDECREF(iter.name);
    Py_XDECREF(iter.state);
    type->tp_free(self);
    Py_DECREF(type);
    Py_TRASHCAN_END;
}

void remember(IterObject& iter, PyTypeObject* leaf_type, std::uint64_t version) noexcept {
    iter.registry_version = version;
    if (iter.leaf_type == leaf_type) return;
    Py_INCREF(type_object(leaf_type));
    PyTypeObject* old = std::exchange(iter.leaf_type, leaf_type);
    xdrop(type_object(old));
}

// The next leaf if it has the class of the last one, else null. Runs no Python code and therefore
// needs no setup. This saves a ninth of the instructions when iterating over a flat tree
// (benchmarks/optree, iterate).
OPTREE_INLINE PyObject* next_like_last(IterObject& iter, const State& state) noexcept {
    if (!iter.turn.is_free() || iter.agenda.empty()) return nullptr;
    const Pending& next = iter.agenda.back();
    if (Py_TYPE(next.object) != iter.leaf_type || next.depth > compat::kMaxDepth ||
        iter.registry_version != state.registry.version()) {
        return nullptr;
    }
    PyObject* leaf = next.object;
    iter.agenda.pop_back();
    return leaf;
}

// The next leaf, or null at the end.
Ref advance(IterObject& iter, Context& context) {
    ObjectStack children;
    while (!iter.agenda.empty()) {
        const Pending next = iter.agenda.back();
        iter.agenda.pop_back();
        Ref object = Ref::steal(next.object);
        if (next.depth > compat::kMaxDepth) {
            raise(PyExc_RecursionError,
                  "Maximum recursion depth exceeded during flattening the tree.");
        }
        if (context.predicate != nullptr && context.is_leaf_by_predicate(object.get()))
            return object;
        Registration* registration = nullptr;
        const std::uint64_t version = context.state.registry.version();
        const Kind kind = context.classify(object.get(), registration);
        if (is_leaf(kind)) {
            if (context.predicate == nullptr) remember(iter, Py_TYPE(object.get()), version);
            return object;
        }
        Payload payload;
        const std::uint32_t arity =
            expand(context, kind, registration, object.get(), children, payload);
        iter.agenda.reserve(iter.agenda.size() + arity);
        while (children.size() != 0) iter.agenda.push_back({children.pop(), next.depth + 1});
    }
    xdrop(type_object(std::exchange(iter.leaf_type, nullptr)));
    return nullptr;
}

OPTREE_NOINLINE PyObject* next_of_any_class(PyObject* self, IterObject& iter, State& state) {
    return guarded(state.error(), [&]() -> PyObject* {
        struct Inside {
            explicit Inside(Turn& turn) : turn_(turn) {
                if (!turn.enter()) raise(PyExc_RuntimeError, "PyTreeIter is already iterating.");
            }
            ~Inside() { turn_.leave(); }
            Turn& turn_;
        };
        const Ref alive = Ref::borrow(self);  // outlives `inside`, which writes to it
        const Inside inside(iter.turn);
        const Ref predicate = Ref::borrow(iter.predicate);
        Context context(state, predicate.get(), iter.none_is_leaf, iter.name);
        context.sorted = iter.sorted;
        return advance(iter, context).release();
    });
}

PyObject* iter_next(PyObject* self) {
    IterObject& iter = as_iter(self);
    State& state = as_state(iter.state);
    if (PyObject* leaf = next_like_last(iter, state)) return leaf;
    return next_of_any_class(self, iter, state);
}

PyMemberDef iter_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(IterObject, weakrefs), READONLY, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyObject* iter_new(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    State* state = nullptr;
    try {
        state = &state_of_type(type);
    } catch (const PythonError&) {
        return nullptr;
    }
    return guarded(state->error(), [&] {
        static const char* const names[] = {"", "leaf_predicate", "none_is_leaf", "namespace",
                                            nullptr};
        PyObject* tree = nullptr;
        PyObject* predicate = nullptr;
        PyObject* none_is_leaf = nullptr;
        PyObject* name = nullptr;
        if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|OOO:PyTreeIter",
                                         const_cast<char**>(names), &tree, &predicate,
                                         &none_is_leaf, &name)) {
            throw PythonError{};
        }
        const Ref space = exact_str(name, state->empty_str.get(), "namespace");
        return new_iter(*state, tree, as_predicate(predicate, "is_leaf"),
                        as_bool(none_is_leaf, "none_is_leaf"), space.get())
            .release();
    });
}

PyObject* iter_reduce(PyObject* self, PyObject*) {
    return PyErr_Format(PyExc_TypeError, "cannot pickle '%s' object", Py_TYPE(self)->tp_name);
}

PyMethodDef iter_methods[] = {
    {"__reduce__", iter_reduce, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

const char kIterDoc[] = "Iterator over the leaves of a tree, depth first.";

PyType_Slot iter_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(iter_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(iter_dealloc)},
    {Py_tp_traverse, reinterpret_cast<void*>(iter_traverse)},
    {Py_tp_clear, reinterpret_cast<void*>(iter_clear)},
    {Py_tp_iter, reinterpret_cast<void*>(PyObject_SelfIter)},
    {Py_tp_iternext, reinterpret_cast<void*>(iter_next)},
    {Py_tp_members, iter_members},
    {Py_tp_methods, iter_methods},
    {Py_tp_doc, const_cast<char*>(kIterDoc)},
    {0, nullptr},
};

PyType_Spec iter_spec = {
    "optree.PyTreeIter",
    sizeof(IterObject),
    0,
    static_cast<unsigned int>(Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | compat::kImmutableType),
    iter_slots,
};

}  // namespace

Ref new_iter(State& state, PyObject* tree, PyObject* predicate, bool none_is_leaf, PyObject* name) {
    auto* type = reinterpret_cast<PyTypeObject*>(state.iter_type.get());
    Ref self = checked(type->tp_alloc(type, 0));
    IterObject& iter = as_iter(self.get());
    new (&iter.agenda) std::vector<Pending>;
    new (&iter.turn) Turn;
    iter.state = compat::new_ref(reinterpret_cast<PyObject*>(&state));
    iter.predicate = compat::xnew_ref(predicate);
    iter.name = compat::new_ref(name);
    iter.none_is_leaf = none_is_leaf;
    iter.sorted = Context(state, nullptr, none_is_leaf, name).sorted;
    iter.leaf_type = nullptr;
    iter.registry_version = 0;
    iter.agenda.push_back({compat::new_ref(tree), 0});
    return self;
}

Ref make_iter_type() { return checked(PyType_FromSpec(&iter_spec)); }

}  // namespace optree
