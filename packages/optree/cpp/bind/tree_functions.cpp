// SPDX-License-Identifier: Apache-2.0
#include "bind/call_context.h"
#include "bind/compiled.h"
#include "bind/functions.h"
#include "bind/one_level.h"
#include "walk/flatten.h"
#include "walk/from_collection.h"
#include "walk/map.h"
#include "walk/paths.h"

namespace optree {
namespace {

using Args = PyObject* const*;

void require_count(const char* function, Py_ssize_t nargs, Py_ssize_t expected) {
    if (OPTREE_UNLIKELY(nargs != expected)) {
        raise(PyExc_TypeError, "%s() takes exactly %zd arguments (%zd given)", function, expected,
              nargs);
    }
}

// Parses (tree, /, leaf_predicate=None, none_is_leaf=False, namespace='').
void parse_tree_call(const char* function, Args args, Py_ssize_t nargs, PyObject* kwnames,
                     PyObject** out) {
    parse_arguments({function, 1, 4, 1, {"tree", "leaf_predicate", "none_is_leaf", "namespace"}},
                    args, nargs, kwnames, out);
}

PyObject* flatten(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[4];
        parse_tree_call("flatten", args, nargs, kwnames, out);
        CallContext call(state, out + 1);
        return flatten_to_pair(call.context, out[0]).release();
    });
}

PyObject* flatten_with_path(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[4];
        parse_tree_call("flatten_with_path", args, nargs, kwnames, out);
        CallContext call(state, out + 1);
        Flattening flat(call.context);
        flat.run(out[0]);
        const Ref spec = flat.take_spec();
        const Ref leaves = flat.leaves.into_list();
        const Ref paths = spec_paths(as_spec(spec.get()));
        return checked(PyTuple_Pack(3, paths.get(), leaves.get(), spec.get())).release();
    });
}

PyObject* leaves(PyObject* self, Args args, Py_ssize_t nargs) {
    return with_state(self, [&](State& state) {
        require_count("leaves", nargs, 4);
        CallContext call(state, args + 1);
        return flatten_to_leaves(call.context, args[0]).release();
    });
}

PyObject* structure(PyObject* self, Args args, Py_ssize_t nargs) {
    return with_state(self, [&](State& state) {
        require_count("structure", nargs, 4);
        CallContext call(state, args + 1);
        return flatten_to_spec(call.context, args[0]).release();
    });
}

void require_map_arguments(const char* function, Args args, Py_ssize_t nargs) {
    require_count(function, nargs, 6);
    if (!PyTuple_CheckExact(args[2]))
        raise(PyExc_TypeError, "expected a tuple of trees, got %R", args[2]);
}

// (func, tree, rests, is_leaf, none_is_leaf, namespace)
PyObject* map(PyObject* self, Args args, Py_ssize_t nargs) {
    return with_state(self, [&](State& state) {
        require_map_arguments("map", args, nargs);
        CallContext call(state, args + 3);
        return tree_map(call.context, args[0], args[1], args[2]).release();
    });
}

PyObject* map_inplace(PyObject* self, Args args, Py_ssize_t nargs) {
    return with_state(self, [&](State& state) {
        require_map_arguments("map_", args, nargs);
        CallContext call(state, args + 3);
        tree_map_inplace(call.context, args[0], args[1], args[2]);
        return compat::new_ref(args[1]);
    });
}

PyObject* call_rows_function(PyObject* self, Args args, Py_ssize_t nargs) {
    return with_state(self, [&](State&) {
        require_count("call_rows", nargs, 2);
        return call_rows(args[0], args[1]).release();
    });
}

bool object_is_leaf(Context& context, PyObject* object) {
    if (context.predicate != nullptr && context.is_leaf_by_predicate(object)) return true;
    Registration* registration = nullptr;
    return is_leaf(context.classify(object, registration));
}

PyObject* is_leaf_function(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[4];
        parse_arguments(
            {"is_leaf", 1, 4, 1, {"obj", "leaf_predicate", "none_is_leaf", "namespace"}}, args,
            nargs, kwnames, out);
        CallContext call(state, out + 1);
        return PyBool_FromLong(object_is_leaf(call.context, out[0]));
    });
}

PyObject* all_leaves(PyObject* self, Args args, Py_ssize_t nargs) {
    return with_state(self, [&](State& state) {
        require_count("all_leaves", nargs, 4);
        CallContext call(state, args + 1);
        const Ref iterator = iterator_of(args[0]);
        while (const Ref object = next_of(iterator.get())) {
            call.context.forget();
            if (!object_is_leaf(call.context, object.get())) return compat::new_ref(Py_False);
        }
        return compat::new_ref(Py_True);
    });
}

PyObject* make_leaf(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[2];
        parse_arguments({"make_leaf", 0, 2, 0, {"none_is_leaf", "namespace"}}, args, nargs, kwnames,
                        out);
        exact_str(out[1], state.empty_str.get(), "namespace");
        return new_leaf_spec(state, as_bool(out[0], "none_is_leaf"), state.empty_str.get())
            .release();
    });
}

PyObject* make_none(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[2];
        parse_arguments({"make_none", 0, 2, 0, {"none_is_leaf", "namespace"}}, args, nargs, kwnames,
                        out);
        exact_str(out[1], state.empty_str.get(), "namespace");
        const bool none_is_leaf = as_bool(out[0], "none_is_leaf");
        if (none_is_leaf) return new_leaf_spec(state, true, state.empty_str.get()).release();
        TreeOwner owner;
        Builder(owner.tree).close(kKindOf<None>, 0);
        return new_spec(state, false, state.empty_str.get(), owner).release();
    });
}

PyObject* make_from_collection(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[3];
        parse_arguments(
            {"make_from_collection", 1, 3, 1, {"collection", "none_is_leaf", "namespace"}}, args,
            nargs, kwnames, out);
        PyObject* const options[] = {nullptr, out[1], out[2]};
        CallContext call(state, options);
        return spec_from_collection(call.context, out[0]).release();
    });
}

PyObject* set_one_level_classes(PyObject* self, Args args, Py_ssize_t nargs) {
    return with_state(self, [&](State& state) {
        require_count("set_one_level", nargs, 4);
        set_one_level(state, args[0], args[1], args + 2);
        return compat::new_ref(Py_None);
    });
}

PyObject* set_stock_classes_function(PyObject* self, PyObject* classes) {
    return with_state(self, [&](State& state) {
        set_stock_classes(state, classes);
        return compat::new_ref(Py_None);
    });
}

PyObject* clear_caches(PyObject* self, PyObject*) {
    return with_state(self, [&](State& state) {
        state.forget_layouts();
        (void)state.layouts();  // clears the layouts of this thread at once
        return compat::new_ref(Py_None);
    });
}

PyObject* compiled(PyObject* self, PyObject* prototype) {
    State& state = as_state(self);
    return guarded(state.error(), [&] { return make_compiled(state, prototype).release(); });
}

}  // namespace

PyMethodDef tree_functions[] = {
    {"flatten", as_cfunction(flatten), kKeywords, "Leaves and structure of a tree."},
    {"flatten_with_path", as_cfunction(flatten_with_path), kKeywords,
     "Paths, leaves and structure of a tree."},
    {"leaves", as_cfunction(leaves), METH_FASTCALL, "Leaves of a tree."},
    {"structure", as_cfunction(structure), METH_FASTCALL, "Structure of a tree."},
    {"map", as_cfunction(map), METH_FASTCALL, "Map a function over one or several trees."},
    {"map_", as_cfunction(map_inplace), METH_FASTCALL,
     "Call a function on the leaves; return the first tree."},
    {"call_rows", as_cfunction(call_rows_function), METH_FASTCALL,
     "Call a function on the rows of a list of columns."},
    {"is_leaf", as_cfunction(is_leaf_function), kKeywords, "Whether an object is a leaf."},
    {"all_leaves", as_cfunction(all_leaves), METH_FASTCALL, "Whether all objects are leaves."},
    {"make_leaf", as_cfunction(make_leaf), kKeywords, "The structure of a leaf."},
    {"make_none", as_cfunction(make_none), kKeywords, "The structure of None."},
    {"make_from_collection", as_cfunction(make_from_collection), kKeywords,
     "A structure from a container of structures."},
    {"set_one_level", as_cfunction(set_one_level_classes), METH_FASTCALL,
     "Set the classes and functions in the results of tree_flatten_one_level."},
    {"set_stock_classes", set_stock_classes_function, METH_O,
     "Record how the classes of path entries and accessors make their instances."},
    {"clear_caches", clear_caches, METH_NOARGS, "Empty the cache of dict keys."},
    {"compiled", compiled, METH_O, "A builtin that does what a public Python function does."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace optree
