// SPDX-License-Identifier: Apache-2.0
#include "bind/functions.h"
#include "bind/interpreters.h"
#include "nodes/attributes.h"
#include "support/arguments.h"
#include "walk/spec_object.h"

namespace optree {
namespace {

using Args = PyObject* const*;

// The number of classes that are nodes in every namespace.
std::size_t count_builtins(const State& state) noexcept {
    std::size_t count = 0;
    for (const Ref& cls : state.classes) count += cls ? 1 : 0;
    return count;
}

// "in namespace 'x'" or "in the global namespace".
Ref where(PyObject* name) {
    return is_empty_str(name) ? checked(PyUnicode_FromString("in the global namespace"))
                              : formatted("in namespace %R", name);
}

void require_class(PyObject* cls) {
    if (!PyType_Check(cls)) raise(PyExc_TypeError, "Expected a class, got %R.", cls);
}

PyObject* register_node(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[6];
        parse_arguments({"register_node",
                         1,
                         6,
                         4,
                         {"cls", "flatten_func", "unflatten_func", "path_entry_type", "namespace",
                          "attributes"}},
                        args, nargs, kwnames, out);
        const Ref name = exact_str(out[4], state.empty_str.get(), "namespace");
        PyObject* cls = out[0];
        require_class(cls);
        for (PyObject* function : {out[1], out[2]}) {
            if (PyCallable_Check(function) == 0)
                raise(PyExc_TypeError, "Expected a callable, got %R.", function);
        }
        if (is_builtin_node(state, cls)) {
            raise(PyExc_ValueError,
                  "PyTree type %R is a built-in type and cannot be re-registered.", cls);
        }
        const Ref registration = make_registration(
            reinterpret_cast<PyTypeObject*>(state.registration_type.get()), cls, out[1], out[2],
            out[3], out[5] == nullptr || out[5] == Py_None ? nullptr : Attributes::parse(out[5]));
        auto* type = reinterpret_cast<PyTypeObject*>(cls);
        if (!state.registry.add(state.registry.get(name.get()), type, registration)) {
            raise(PyExc_ValueError, "PyTree type %R is already registered %U.", cls,
                  where(name.get()).get());
        }
        return compat::new_ref(Py_None);
    });
}

PyObject* unregister_node(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[2];
        parse_arguments({"unregister_node", 1, 2, 1, {"cls", "namespace"}}, args, nargs, kwnames,
                        out);
        const Ref name = exact_str(out[1], state.empty_str.get(), "namespace");
        PyObject* cls = out[0];
        require_class(cls);
        if (is_builtin_node(state, cls)) {
            raise(PyExc_ValueError, "PyTree type %R is a built-in type and cannot be unregistered.",
                  cls);
        }
        auto* type = reinterpret_cast<PyTypeObject*>(cls);
        Namespace* space =
            is_empty_str(name.get()) ? &state.registry.global() : state.registry.find(name.get());
        Ref removed;
        if (space != nullptr) removed = state.registry.remove(*space, type);
        if (!removed) {
            const Ref place = where(name.get());
            if (state.tuples.is_structseq(type)) {
                raise(PyExc_ValueError,
                      "PyTree type %R is a class of `PyStructSequence`, which is not explicitly "
                      "registered %U.",
                      cls, place.get());
            }
            if (state.tuples.is_namedtuple(type)) {
                raise(PyExc_ValueError,
                      "PyTree type %R is a subclass of `collections.namedtuple`, which is not "
                      "explicitly registered %U.",
                      cls, place.get());
            }
            raise(PyExc_ValueError, "PyTree type %R is not registered %U.", cls, place.get());
        }
        return compat::new_ref(Py_None);
    });
}

PyObject* get_registry_size(PyObject* self, Args args, Py_ssize_t nargs, PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[1];
        parse_arguments({"get_registry_size", 0, 1, 0, {"namespace"}}, args, nargs, kwnames, out);
        std::size_t size = count_builtins(state) + state.registry.global().size();
        if (out[0] == nullptr || out[0] == Py_None) {
            size += state.registry.named_size();
        } else {
            const Ref name = exact_str(out[0], nullptr, "namespace");
            if (const Namespace* named = state.registry.find(name.get())) size += named->size();
        }
        return checked(PyLong_FromSize_t(size)).release();
    });
}

PyObject* is_dict_insertion_ordered(PyObject* self, Args args, Py_ssize_t nargs,
                                    PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[2];
        parse_arguments(
            {"is_dict_insertion_ordered", 0, 2, 0, {"namespace", "inherit_global_namespace"}}, args,
            nargs, kwnames, out);
        const Ref name = exact_str(out[0], state.empty_str.get(), "namespace");
        const bool inherit = out[1] == nullptr || as_bool(out[1], "inherit_global_namespace");
        const Namespace* named =
            is_empty_str(name.get()) ? &state.registry.global() : state.registry.find(name.get());
        const bool ordered = (named != nullptr && named->insertion_ordered) ||
                             (inherit && state.registry.global().insertion_ordered);
        return PyBool_FromLong(ordered);
    });
}

PyObject* set_dict_insertion_ordered(PyObject* self, Args args, Py_ssize_t nargs,
                                     PyObject* kwnames) {
    return with_state(self, [&](State& state) {
        PyObject* out[2];
        parse_arguments({"set_dict_insertion_ordered", 1, 2, 1, {"mode", "namespace"}}, args, nargs,
                        kwnames, out);
        const bool mode = as_bool(out[0], "mode");
        const Ref name = exact_str(out[1], state.empty_str.get(), "namespace");
        state.registry.get(name.get()).insertion_ordered.store(mode, std::memory_order_relaxed);
        return compat::new_ref(Py_None);
    });
}

// ---- namedtuples and PyStructSequences

PyTypeObject* class_of(PyObject* object) {
    return PyType_Check(object) ? reinterpret_cast<PyTypeObject*>(object) : Py_TYPE(object);
}

[[noreturn]] OPTREE_COLD void raise_not_of(const char* family, PyObject* object) {
    raise(PyExc_TypeError,
          PyType_Check(object) ? "Expected a %s type, got %R."
                               : "Expected an instance of %s type, got %R.",
          family, object);
}

// The predicates for one family of classes.
#define OPTREE_FAMILY(NAME, LABEL)                                                      \
    PyObject* is_##NAME(PyObject* self, PyObject* object) {                             \
        return with_state(self, [&](State& state) {                                     \
            return PyBool_FromLong(state.tuples.is_##NAME(class_of(object)));           \
        });                                                                             \
    }                                                                                   \
    PyObject* is_##NAME##_instance(PyObject* self, PyObject* object) {                  \
        return with_state(self, [&](State& state) {                                     \
            return PyBool_FromLong(state.tuples.is_##NAME(Py_TYPE(object)));            \
        });                                                                             \
    }                                                                                   \
    PyObject* is_##NAME##_class(PyObject* self, PyObject* object) {                     \
        return PyType_Check(object) ? is_##NAME(self, object) : PyBool_FromLong(0);     \
    }                                                                                   \
    PyObject* NAME##_fields_function(PyObject* self, PyObject* object) {                \
        return with_state(self, [&](State& state) {                                     \
            if (!state.tuples.is_##NAME(class_of(object))) raise_not_of(LABEL, object); \
            return NAME##_fields(class_of(object)).release();                           \
        });                                                                             \
    }
OPTREE_FAMILY(namedtuple, "collections.namedtuple")
OPTREE_FAMILY(structseq, "PyStructSequence")
#undef OPTREE_FAMILY

// ---- interpreters

PyObject* get_num_interpreters_seen(PyObject*, PyObject*) {
    return PyLong_FromSize_t(interpreters_seen());
}
PyObject* get_num_interpreters_alive(PyObject* self, PyObject*) {
    return with_state(self, [](State&) { return PyLong_FromSize_t(alive_interpreters().size()); });
}
PyObject* get_alive_interpreter_ids(PyObject* self, PyObject*) {
    return with_state(self, [&](State&) {
        Ref ids = checked(PySet_New(nullptr));
        for (const std::int64_t id : alive_interpreters()) {
            const Ref number = checked(PyLong_FromLongLong(id));
            check_status(PySet_Add(ids.get(), number.get()));
        }
        return ids.release();
    });
}
PyObject* get_current_interpreter_id(PyObject*, PyObject*) {
    return PyLong_FromLongLong(current_interpreter());
}
PyObject* get_main_interpreter_id(PyObject*, PyObject*) {
    return PyLong_FromLongLong(main_interpreter());
}
PyObject* is_current_interpreter_main(PyObject*, PyObject*) {
    return PyBool_FromLong(current_interpreter() == main_interpreter());
}

}  // namespace

PyMethodDef registry_functions[] = {
    {"register_node", as_cfunction(register_node), kKeywords, "Register a class as a node."},
    {"unregister_node", as_cfunction(unregister_node), kKeywords, "Remove a registration."},
    {"get_registry_size", as_cfunction(get_registry_size), kKeywords,
     "Number of registered classes."},
    {"is_dict_insertion_ordered", as_cfunction(is_dict_insertion_ordered), kKeywords,
     "Whether dicts are traversed in insertion order."},
    {"set_dict_insertion_ordered", as_cfunction(set_dict_insertion_ordered), kKeywords,
     "Choose whether dicts are traversed in insertion order."},
    {"is_namedtuple", is_namedtuple, METH_O,
     "Whether an object is a namedtuple or a namedtuple class."},
    {"is_namedtuple_instance", is_namedtuple_instance, METH_O,
     "Whether an object is a namedtuple."},
    {"is_namedtuple_class", is_namedtuple_class, METH_O,
     "Whether an object is a namedtuple class."},
    {"namedtuple_fields", namedtuple_fields_function, METH_O, "Field names of a namedtuple."},
    {"is_structseq", is_structseq, METH_O,
     "Whether an object is a PyStructSequence or such a class."},
    {"is_structseq_instance", is_structseq_instance, METH_O,
     "Whether an object is a PyStructSequence."},
    {"is_structseq_class", is_structseq_class, METH_O,
     "Whether an object is a PyStructSequence class."},
    {"structseq_fields", structseq_fields_function, METH_O, "Field names of a PyStructSequence."},
    {"get_num_interpreters_seen", get_num_interpreters_seen, METH_NOARGS,
     "Number of interpreters that imported the module so far."},
    {"get_num_interpreters_alive", get_num_interpreters_alive, METH_NOARGS,
     "Number of live interpreters that imported the module."},
    {"get_alive_interpreter_ids", get_alive_interpreter_ids, METH_NOARGS,
     "Ids of the live interpreters that imported the module."},
    {"get_current_interpreter_id", get_current_interpreter_id, METH_NOARGS,
     "Id of this interpreter."},
    {"get_main_interpreter_id", get_main_interpreter_id, METH_NOARGS,
     "Id of the main interpreter."},
    {"is_current_interpreter_main", is_current_interpreter_main, METH_NOARGS,
     "Whether this is the main interpreter."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace optree
