// SPDX-License-Identifier: Apache-2.0
// The items of a tuple, and instances of tuple subclasses created without calling the class.
#pragma once

#include <algorithm>

#include "cpython/trials.h"

namespace optree {

// The items of a tuple or of an instance of a subclass. Also valid for the unset items of a new
// one.
OPTREE_INLINE PyObject** tuple_items(PyObject* tuple) noexcept {
    return reinterpret_cast<PyTupleObject*>(tuple)->ob_item;
}

// The offset of an item in an instance, equal to the offset of a PyStructSequence member.
inline Py_ssize_t offset_of_tuple_item(Py_ssize_t index) noexcept {
    return static_cast<Py_ssize_t>(offsetof(PyTupleObject, ob_item)) +
           index * static_cast<Py_ssize_t>(sizeof(PyObject*));
}

// A new instance of a tuple subclass that takes over the references to `items`. Returns null and
// takes nothing on error. Only valid if `trials.tuple_items` held; otherwise the class is called.
//
// An instance without attributes need not be zeroed first as in `tp_alloc`. The collector tracks it
// once it is complete.
inline PyObject* new_plain_tuple(PyTypeObject* type, PyObject* const* items,
                                 std::size_t count) noexcept {
    const auto size = static_cast<Py_ssize_t>(count);
    const bool bare = type->tp_basicsize == PyTuple_Type.tp_basicsize;
    PyObject* made =
        bare ? reinterpret_cast<PyObject*>(PyObject_GC_NewVar(PyTupleObject, type, size))
             : type->tp_alloc(type, size);
    if (OPTREE_UNLIKELY(made == nullptr)) return nullptr;
#if PY_VERSION_HEX >= 0x030E0000 && !defined(PYPY_VERSION)
    reinterpret_cast<PyTupleObject*>(made)->ob_hash = -1;  // not computed yet
#endif
    std::copy_n(items, count, tuple_items(made));
    if (bare) PyObject_GC_Track(made);
    return made;
}

// A tuple that takes over the references to `items`. Returns null and takes nothing on error.
inline PyObject* new_tuple_of(PyObject* const* items, std::size_t count) noexcept {
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(count));
    if (OPTREE_LIKELY(tuple != nullptr)) std::copy_n(items, count, tuple_items(tuple));
    return tuple;
}

}  // namespace optree
