// SPDX-License-Identifier: Apache-2.0
// The parts of a Python function, read without running Python code and without taking references.
#pragma once

#include "cpython/trials.h"

namespace optree {

// The referent of a weak reference, or null if it is gone. With the interpreter lock the referent
// stays alive until Python code runs. Without the lock it stays alive as long as this object.
class WeakTarget {
  public:
    WeakTarget() noexcept = default;
    WeakTarget(const WeakTarget&) = delete;
    WeakTarget& operator=(const WeakTarget&) = delete;
#if defined(Py_GIL_DISABLED)
    ~WeakTarget() { Py_XDECREF(object_); }
    void set(PyObject* weakref) noexcept {
        Py_XDECREF(object_);
        object_ = nullptr;
        PyWeakref_GetRef(weakref, &object_);
    }
#else
    void set(PyObject* weakref) noexcept {
        PyObject* target = reinterpret_cast<PyWeakReference*>(weakref)->wr_object;
        object_ = target != Py_None ? target : nullptr;
    }
#endif
    PyObject* get() const noexcept { return object_; }
    explicit operator bool() const noexcept { return object_ != nullptr; }

  private:
    PyObject* object_ = nullptr;
};

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
