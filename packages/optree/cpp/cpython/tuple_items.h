// SPDX-License-Identifier: Apache-2.0
// The items of a tuple, and instances of its subclasses made without calling these.
#pragma once

#include <cstring>

#include "cpython/trials.h"

namespace optree {

// The items of a tuple, or of an instance of a subclass; also the empty places of a new one.
OPTREE_INLINE PyObject** tuple_items(PyObject* tuple) noexcept {
    return reinterpret_cast<PyTupleObject*>(tuple)->ob_item;
}

// Where an item stands in an instance: the offset that a member of a PyStructSequence has.
inline Py_ssize_t offset_of_tuple_item(Py_ssize_t index) noexcept {
    return static_cast<Py_ssize_t>(offsetof(PyTupleObject, ob_item)) +
           index * static_cast<Py_ssize_t>(sizeof(PyObject*));
}

// A new instance of a tuple subclass with null items; null on error. Asked for where
// `trials.tuple_items` held; otherwise the class is called.
inline PyObject* new_plain_tuple(PyTypeObject* type, Py_ssize_t count) noexcept {
    PyObject* made = type->tp_alloc(type, count);
#if PY_VERSION_HEX >= 0x030E0000 && !defined(PYPY_VERSION)
    if (made != nullptr) reinterpret_cast<PyTupleObject*>(made)->ob_hash = -1;  // not computed yet
#endif
    return made;
}

// A tuple that takes over the references to `items`; null, and nothing taken, on error.
inline PyObject* new_tuple_of(PyObject* const* items, std::size_t count) noexcept {
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(count));
    if (OPTREE_LIKELY(tuple != nullptr) && count != 0) {
        std::memcpy(static_cast<void*>(tuple_items(tuple)), items, count * sizeof(PyObject*));
    }
    return tuple;
}

}  // namespace optree
