// SPDX-License-Identifier: Apache-2.0
// What a Python function consists of, read without running Python code and without a reference more.
#pragma once

#include "cpython/trials.h"

namespace optree {

// Of an object that PyFunction_Check says is one. All answers are borrowed.
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
// What a cell of its closure holds; null for nothing.
OPTREE_INLINE PyObject* held_by_closure(PyObject* function, Py_ssize_t index) noexcept {
    return PyCell_GET(PyTuple_GET_ITEM(PyFunction_GET_CLOSURE(function), index));
}
// How many parameters a function of this code has, those only by keyword aside.
inline std::size_t parameters_of(PyObject* code) noexcept {
    return static_cast<std::size_t>(reinterpret_cast<PyCodeObject*>(code)->co_argcount);
}

}  // namespace optree
