// SPDX-License-Identifier: Apache-2.0
// The parts of a Python function, read without running Python code and without taking references.
#pragma once

#include "cpython/trials.h"

namespace optree {

// The referent of a weak reference, or null if it is gone. Only valid with the interpreter lock, and
// until Python code runs.
OPTREE_INLINE PyObject* target_of(PyObject* weakref) noexcept {
    PyObject* target = reinterpret_cast<PyWeakReference*>(weakref)->wr_object;
    return target != Py_None ? target : nullptr;
}

// The function that a staticmethod wraps; null for an object of another class.
OPTREE_INLINE PyObject* callable_of_static(PyObject* method) noexcept {
    struct StaticMethod {
        PyObject_HEAD
        PyObject* callable;
    };
    if (Py_TYPE(method) != &PyStaticMethod_Type) return nullptr;
    return reinterpret_cast<StaticMethod*>(method)->callable;
}

// For an object that passes PyFunction_Check. The results are borrowed.
OPTREE_INLINE PyObject* code_of(PyObject* function) noexcept {
    return PyFunction_GET_CODE(function);
}
OPTREE_INLINE PyObject* globals_of(PyObject* function) noexcept {
    return PyFunction_GET_GLOBALS(function);
}
OPTREE_INLINE Py_ssize_t size_of_closure(PyObject* function) noexcept {
    PyObject* closure = PyFunction_GET_CLOSURE(function);
    return closure != nullptr ? PyTuple_GET_SIZE(closure) : 0;
}
// The content of one cell of its closure; null if the cell is empty.
OPTREE_INLINE PyObject* held_by_closure(PyObject* function, Py_ssize_t index) noexcept {
    return PyCell_GET(PyTuple_GET_ITEM(PyFunction_GET_CLOSURE(function), index));
}
// The number of parameters of a function with this code, keyword-only ones not counted.
inline std::size_t parameters_of(PyObject* code) noexcept {
    return static_cast<std::size_t>(reinterpret_cast<PyCodeObject*>(code)->co_argcount);
}

}  // namespace optree
