// SPDX-License-Identifier: Apache-2.0
// The extension module optree._C.
#include <pybind11/eval.h>
#include <pybind11/pybind11.h>

#include <string_view>

#include "bind/functions.h"
#include "bind/interpreters.h"
#include "bind/spec_type.h"
#include "cpython/trials.h"
#include "nodes/state.h"
#include "support/errors.h"
#include "walk/iterate.h"

namespace py = pybind11;

namespace optree {
namespace {

py::object borrow(const Ref& ref) { return py::reinterpret_borrow<py::object>(ref.get()); }

// ---- build-time facts

py::dict internals() {
    py::dict held;
#define OPTREE_TRIAL(name) held[#name] = trials.name.held();
    OPTREE_TRIALS(OPTREE_TRIAL)
#undef OPTREE_TRIAL
    return held;
}

py::object read_only(const py::dict& dict) {
    return py::reinterpret_steal<py::object>(checked(PyDictProxy_New(dict.ptr())).release());
}

py::dict buildtime_metadata(const State& state) {
    const py::object hex = py::eval(
        "type('HexInt', (int,), {'__module__': 'optree._C', '__repr__': lambda x: '0x%08X' % x})",
        py::dict());
    py::dict facts;
    facts["PY_VERSION"] = PY_VERSION;
    facts["PY_VERSION_HEX"] = hex(PY_VERSION_HEX);
    if (compat::kPyPy) {
        facts["PYPY_VERSION"] = compat::kPyPyVersion;
        facts["PYPY_VERSION_NUM"] = hex(compat::kPyPyVersionNumber);
    }
    facts["Py_DEBUG"] = compat::kDebug;
    facts["Py_GIL_DISABLED"] = compat::kFreeThreaded;
    facts["PYBIND11_VERSION_HEX"] = hex(PYBIND11_VERSION_HEX);
    facts["PYBIND11_INTERNALS_VERSION"] = PYBIND11_INTERNALS_VERSION;
    facts["PYBIND11_INTERNALS_ID"] = PYBIND11_INTERNALS_ID;
    facts["PYBIND11_MODULE_LOCAL_ID"] = PYBIND11_MODULE_LOCAL_ID;
    facts["PYBIND11_HAS_NATIVE_ENUM"] = true;
    facts["PYBIND11_HAS_INTERNALS_WITH_SMART_HOLDER_SUPPORT"] = true;
#if defined(PYBIND11_HAS_SUBINTERPRETER_SUPPORT)
    facts["PYBIND11_HAS_SUBINTERPRETER_SUPPORT"] = true;
#else
    facts["PYBIND11_HAS_SUBINTERPRETER_SUPPORT"] = false;
#endif
    facts["OPTREE_HAS_SUBINTERPRETER_SUPPORT"] = !compat::kPyPy;
#if defined(_GLIBCXX_USE_CXX11_ABI)
    facts["GLIBCXX_USE_CXX11_ABI"] = _GLIBCXX_USE_CXX11_ABI != 0;
#else
    facts["GLIBCXX_USE_CXX11_ABI"] = false;
#endif
    facts["MSVC_DISABLE_CONSTEXPR_MUTEX_CONSTRUCTOR"] = false;
    facts["OPTREE_HAS_READ_WRITE_LOCK"] = false;
    for (const KindFacts& kind : kinds::facts) {
        if (std::string_view(kind.name) == "frozendict") {
            facts["OPTREE_HAS_FROZENDICT"] = bool(state.classes[kind.value]);
        }
    }
    return facts;
}

// ---- classes

void add_kind_enum(py::module_& module, State& state) {
    py::list members;
    for (const KindFacts& kind : kinds::facts) {
        members.append(py::make_tuple(kind.python_name, kind.value));
    }
    const py::object enum_class = py::module_::import("enum").attr("IntEnum");
    py::object kind_enum = enum_class("PyTreeKind", members, py::arg("module") = "optree",
                                      py::arg("qualname") = "PyTreeKind");
    for (const KindFacts& kind : kinds::facts) {
        const py::object member = kind_enum.attr(kind.python_name);
        state.kinds[kind.value] = Ref::borrow(member.ptr());
    }
    // Not a member of the enum, so it is set without going through the metaclass.
    auto* type = reinterpret_cast<PyTypeObject*>(kind_enum.ptr());
    const py::int_ count(kNumKinds);
    check_status(compat::set_class_attribute(type, "NUM_KINDS", count.ptr()));
    kind_enum.attr("__doc__") = "The kind of a node of a tree.";
    type->tp_flags |= compat::kImmutableType;
    state.kind_enum = Ref::borrow(kind_enum.ptr());
    module.attr("PyTreeKind") = kind_enum;
}

void add_functions(py::module_& module, State& state, PyMethodDef* table) {
    const py::object name = module.attr("__name__");
    for (PyMethodDef* entry = table; entry->ml_name != nullptr; ++entry) {
        const Ref function =
            checked(PyCFunction_NewEx(entry, reinterpret_cast<PyObject*>(&state), name.ptr()));
        module.attr(entry->ml_name) = borrow(function);
    }
}

// ---- the end of an interpreter

PyObject* at_exit(PyObject* self, PyObject*) {
    // The registry is kept: code that runs after this can still use trees. It is destroyed with the
    // module.
    as_state(self).forget_layouts();
    interpreter_leaves(current_interpreter());
    Py_RETURN_NONE;
}

PyMethodDef at_exit_def = {"at_exit", at_exit, METH_NOARGS, nullptr};

void fill_module(py::module_& module) {
    const Ref owner = make_state();
    State& state = as_state(owner.get());

    state.internal_error = checked(PyErr_NewExceptionWithDoc("optree._C.InternalError",
                                                             "A bug in optree: please report it.",
                                                             PyExc_SystemError, nullptr));
    module.attr("InternalError") = borrow(state.internal_error);
    state.spec_type = make_spec_type();
    state.iter_type = make_iter_type();
    bind_type_to_state(state.spec(), state);
    bind_type_to_state(reinterpret_cast<PyTypeObject*>(state.iter_type.get()), state);
    module.attr("PyTreeSpec") = borrow(state.spec_type);
    module.attr("PyTreeIter") = borrow(state.iter_type);
    add_kind_enum(module, state);
    add_functions(module, state, tree_functions);
    add_functions(module, state, registry_functions);

    module.attr("MAX_RECURSION_DEPTH") = compat::kMaxDepth;
    module.attr("Py_TPFLAGS_BASETYPE") = Py_TPFLAGS_BASETYPE;
    module.attr("PyStructSequence_UnnamedField") = "unnamed field";
    const py::dict facts = buildtime_metadata(state);
    for (const auto& [name, value] : facts) module.attr(name) = value;
    module.attr("BUILDTIME_METADATA") = read_only(facts);
    module.attr("CPYTHON_INTERNALS") = read_only(internals());

    const Ref callback = checked(PyCFunction_New(&at_exit_def, owner.get()));
    const Ref atexit = checked(PyImport_ImportModule("atexit"));
    checked(PyObject_CallMethod(atexit.get(), "register", "O", callback.get()));
    interpreter_enters(current_interpreter());
}

// ---- the module

int execute(PyObject* object) {
    try {
        auto module = py::reinterpret_borrow<py::module_>(object);
        fill_module(module);
        return 0;
    } catch (const PythonError&) {
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_ImportError, error.what());
    }
    if (!PyErr_ExceptionMatches(PyExc_ImportError)) {
        py::raise_from(PyExc_ImportError, "initialization failed");
    }
    return -1;
}

// Each interpreter gets its own module with its own state. pybind11 does not create it: its modules
// take the lock of the main interpreter, which deadlocks in other interpreters before CPython 3.12.
PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(execute)},
    OPTREE_MODULE_PER_INTERPRETER  //
        OPTREE_MODULE_WITHOUT_GIL  //
    {0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_C",
    // The tests of the published package compare this text.
    "Optimized PyTree Utilities. (C extension module built from src/optree.cpp)", 0, nullptr,
    module_slots, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace optree

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&optree::module_definition); }
