// SPDX-License-Identifier: Apache-2.0
// Shared by the kinds whose children stand in a row.
#pragma once

#include <cstring>

#include "nodes/context.h"
#include "support/errors.h"

namespace optree {

inline void drop_children(PyObject** children, std::size_t count) noexcept {
    for (std::size_t i = 0; i < count; ++i) Py_DECREF(children[i]);
}

inline PyObject** tuple_items(PyObject* tuple) noexcept {
    return reinterpret_cast<PyTupleObject*>(tuple)->ob_item;
}

// A new instance of a tuple subclass with null items; null on error.
inline PyObject* new_plain_tuple(PyTypeObject* type, Py_ssize_t count) noexcept {
    PyObject* made = type->tp_alloc(type, count);
#if PY_VERSION_HEX >= 0x030E0000 && !defined(PYPY_VERSION)
    if (made != nullptr) reinterpret_cast<PyTupleObject*>(made)->ob_hash = -1;  // not computed yet
#endif
    return made;
}

// A tuple of more references to `items`.
inline Ref tuple_of(PyObject* const* items, std::size_t count) {
    Ref tuple = checked(PyTuple_New(static_cast<Py_ssize_t>(count)));
    for (std::size_t i = 0; i < count; ++i) tuple_items(tuple.get())[i] = compat::new_ref(items[i]);
    return tuple;
}

// A tuple that takes over the references to `children`; null with the references dropped on error.
inline PyObject* steal_into_tuple(PyObject** children, std::size_t count) noexcept {
    PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(count));
    if (OPTREE_UNLIKELY(tuple == nullptr)) {
        drop_children(children, count);
        return nullptr;
    }
    if (count != 0)
        std::memcpy(static_cast<void*>(tuple_items(tuple)), children, count * sizeof(PyObject*));
    return tuple;
}

inline PyObject* steal_into_list(PyObject** children, std::size_t count) noexcept {
    const bool give = compat::kListTakesItems && count != 0;
    PyObject* list = PyList_New(give ? 0 : static_cast<Py_ssize_t>(count));
    if (OPTREE_UNLIKELY(list == nullptr)) {
        drop_children(children, count);
        return nullptr;
    }
    if (give) {
        void* items = PyMem_Malloc(count * sizeof(PyObject*));
        if (OPTREE_UNLIKELY(items == nullptr)) {
            Py_DECREF(list);
            drop_children(children, count);
            PyErr_NoMemory();
            return nullptr;
        }
        std::memcpy(items, children, count * sizeof(PyObject*));
        compat::give_items(list, static_cast<PyObject**>(items), static_cast<Py_ssize_t>(count));
        return list;
    }
    if (count != 0) {
        std::memcpy(static_cast<void*>(reinterpret_cast<PyListObject*>(list)->ob_item), children,
                    count * sizeof(PyObject*));
    }
    return list;
}

// Pushes the items of a tuple (or of an instance of a subclass).
inline std::uint32_t push_tuple_items(PyObject* tuple, ObjectStack& children) {
    const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(tuple));
    children.reserve(count);
    for (std::size_t i = 0; i < count; ++i) children.push_unchecked(tuple_items(tuple)[i]);
    return checked_count(count);
}

[[noreturn]] OPTREE_COLD void raise_expected(const char* what, PyObject* got);
[[noreturn]] OPTREE_COLD void raise_arity(const char* kind, const char* label,
                                          std::uint32_t expected, Py_ssize_t got, PyObject* object);

inline Ref index_entry(std::uint32_t index) { return checked(PyLong_FromSize_t(index)); }

}  // namespace optree
