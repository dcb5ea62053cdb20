// SPDX-License-Identifier: Apache-2.0
#include "bind/compiled.h"

#include "bind/call_context.h"
#include "bind/one_level.h"
#include "walk/flatten.h"
#include "walk/unflatten.h"

namespace optree {
namespace {

// The state of the module object that serves as `self` of a builtin. A builtin is used because
// calling a Python function costs 60 ns more, which is as long as flattening a small tree takes
// (benchmarks/optree, leaf and tuple of 3). `self` is a module because pickle finds a builtin by
// name only in that case.
struct Compiled {
    PyObject* state;      // owned
    PyObject* prototype;  // owned
    PyObject* doc;        // owned: the str whose UTF-8 buffer the method points to
    PyMethodDef method;
};

int traverse(PyObject* self, visitproc visit, void* arg) {
    if (const auto* compiled = static_cast<Compiled*>(PyModule_GetState(self))) {
        Py_VISIT(compiled->state);
        Py_VISIT(compiled->prototype);
    }
    return 0;
}

int clear(PyObject* self) {
    if (auto* compiled = static_cast<Compiled*>(PyModule_GetState(self))) {
        Py_CLEAR(compiled->prototype);  // calls still use the state
    }
    return 0;
}

void free_self(void* self) {
    auto* compiled = static_cast<Compiled*>(PyModule_GetState(static_cast<PyObject*>(self)));
    if (compiled == nullptr) return;
    Py_CLEAR(compiled->prototype);
    Py_CLEAR(compiled->state);
    Py_CLEAR(compiled->doc);
}

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "optree.ops",
                          nullptr,
                          sizeof(Compiled),
                          nullptr,
                          nullptr,
                          traverse,
                          clear,
                          free_self};

Compiled& compiled_of(PyObject* self) noexcept {
    return *static_cast<Compiled*>(PyModule_GetState(self));
}

PyObject* call_prototype(const Compiled& compiled, PyObject* const* args, Py_ssize_t nargs,
                         PyObject* kwnames) {
    if (compiled.prototype == nullptr) {
        PyErr_SetString(PyExc_RuntimeError, "optree has been unloaded");
        return nullptr;
    }
    return PyObject_Vectorcall(compiled.prototype, args, static_cast<std::size_t>(nargs), kwnames);
}

// The arguments of (tree, /, is_leaf=None, *, none_is_leaf=False, namespace=''). Those not passed
// are null.
struct TreeArguments {
    PyObject* tree = nullptr;
    PyObject* options[3] = {nullptr, nullptr, nullptr};

    bool parse(const State& state, PyObject* const* args, Py_ssize_t nargs,
               PyObject* kwnames) noexcept {
        if (nargs != 1 && nargs != 2) return false;
        tree = args[0];
        if (nargs == 2) options[0] = args[1];
        const Py_ssize_t keywords = kwnames != nullptr ? PyTuple_GET_SIZE(kwnames) : 0;
        for (Py_ssize_t i = 0; i < keywords; ++i) {
            PyObject* name = PyTuple_GET_ITEM(kwnames, i);
            const int which = name == state.str_none_is_leaf.get() ? 1
                              : name == state.str_namespace.get()  ? 2
                              : name == state.str_is_leaf.get()    ? 0
                                                                   : 3;
            if (which == 3 || options[which] != nullptr) return false;
            options[which] = args[nargs + i];
        }
        return true;
    }
};

template <class Body>
OPTREE_INLINE PyObject* with_tree(PyObject* self, PyObject* const* args, Py_ssize_t nargs,
                                  PyObject* kwnames, Body&& body) {
    const Compiled& compiled = compiled_of(self);
    State& state = as_state(compiled.state);
    TreeArguments arguments;
    if (OPTREE_UNLIKELY(!arguments.parse(state, args, nargs, kwnames))) {
        return call_prototype(compiled, args, nargs, kwnames);
    }
    return guarded(state.error(), [&] {
        CallContext call(state, arguments.options);
        return body(call.context, arguments.tree).release();
    });
}

PyObject* tree_flatten(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_tree(self, args, nargs, kwnames, flatten_to_pair);
}

PyObject* tree_leaves(PyObject* self, PyObject* const* args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_tree(self, args, nargs, kwnames, flatten_to_leaves);
}

PyObject* tree_structure(PyObject* self, PyObject* const* args, Py_ssize_t nargs,
                         PyObject* kwnames) {
    return with_tree(self, args, nargs, kwnames, flatten_to_spec);
}

PyObject* tree_unflatten(PyObject* self, PyObject* const* args, Py_ssize_t nargs,
                         PyObject* kwnames) {
    const Compiled& compiled = compiled_of(self);
    State& state = as_state(compiled.state);
    if (OPTREE_UNLIKELY(nargs != 2 || kwnames != nullptr || Py_TYPE(args[0]) != state.spec() ||
                        !is_initialised(as_spec(args[0])))) {
        return call_prototype(compiled, args, nargs, kwnames);
    }
    return guarded(state.error(), [&] {
        return unflatten_iterable(state, view_of(as_spec(args[0]).tree), args[1]).release();
    });
}

// Whether the options are of the usual classes. The prototype handles the others, errors included.
bool are_plain(PyObject* const* options) noexcept {
    return (options[0] == nullptr || options[0] == Py_None || PyCallable_Check(options[0]) != 0) &&
           (options[1] == nullptr || PyBool_Check(options[1])) &&
           (options[2] == nullptr || PyUnicode_CheckExact(options[2]));
}

PyObject* tree_flatten_one_level(PyObject* self, PyObject* const* args, Py_ssize_t nargs,
                                 PyObject* kwnames) {
    const Compiled& compiled = compiled_of(self);
    State& state = as_state(compiled.state);
    TreeArguments arguments;
    if (OPTREE_UNLIKELY(!arguments.parse(state, args, nargs, kwnames) ||
                        !are_plain(arguments.options) || !knows_one_level(state))) {
        return call_prototype(compiled, args, nargs, kwnames);
    }
    return guarded(state.error(), [&] {
        CallContext call(state, arguments.options);
        return flatten_one_level(call.context, arguments.tree).release();
    });
}

#define OPTREE_TREE_SIGNATURE "(tree, /, is_leaf=None, *, none_is_leaf=False, namespace='')"

struct Entry {
    const char* name;
    const char* signature;
    PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t, PyObject*);
};

const Entry entries[] = {
    {"tree_flatten", OPTREE_TREE_SIGNATURE, tree_flatten},
    {"tree_leaves", OPTREE_TREE_SIGNATURE, tree_leaves},
    {"tree_structure", OPTREE_TREE_SIGNATURE, tree_structure},
    {"tree_unflatten", "(treespec, leaves)", tree_unflatten},
    {"tree_flatten_one_level", OPTREE_TREE_SIGNATURE, tree_flatten_one_level},
};

const Entry& entry_of(PyObject* prototype) {
    const Ref name = attribute_of(prototype, "__name__");
    for (const Entry& entry : entries) {
        if (PyUnicode_Check(name.get()) &&
            PyUnicode_CompareWithASCIIString(name.get(), entry.name) == 0) {
            return entry;
        }
    }
    raise(PyExc_ValueError,
          "expected the prototype of tree_flatten, tree_leaves, tree_structure, tree_unflatten or "
          "tree_flatten_one_level, got %R",
          prototype);
}

}  // namespace

Ref make_compiled(State& state, PyObject* prototype) {
    const Entry& entry = entry_of(prototype);
    const Ref text = attribute_of(prototype, "__doc__");
    const Ref doc = formatted("%s%s\n--\n\n%S", entry.name, entry.signature, text.get());
    const char* utf8 = PyUnicode_AsUTF8(doc.get());
    if (utf8 == nullptr) throw PythonError{};

    const Ref self = checked(PyModule_Create(&definition));
    Compiled& compiled = compiled_of(self.get());
    compiled.state = compat::new_ref(reinterpret_cast<PyObject*>(&state));
    compiled.prototype = compat::new_ref(prototype);
    compiled.doc = compat::new_ref(doc.get());
    // For tools that inspect Python code, such as TorchDynamo.
    check_status(PyObject_SetAttrString(self.get(), "prototype", prototype));
    compiled.method = {entry.name, as_cfunction(entry.function), kKeywords, utf8};
    const Ref module_name = checked(PyUnicode_InternFromString(definition.m_name));
    return checked(PyCFunction_NewEx(&compiled.method, self.get(), module_name.get()));
}

}  // namespace optree
