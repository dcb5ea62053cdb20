// SPDX-License-Identifier: Apache-2.0
// Shared by the kinds whose children stand in a row.
#pragma once

#include "cpython/list_items.h"
#include "cpython/tuple_items.h"
#include "nodes/context.h"
#include "support/errors.h"

namespace optree {

inline void drop_children(PyObject** children, std::size_t count) noexcept {
    for (std::size_t i = 0; i < count; ++i) Py_DECREF(children[i]);
}

// A tuple of more references to `items`.
inline Ref tuple_of(PyObject* const* items, std::size_t count) {
    Ref tuple = checked(PyTuple_New(static_cast<Py_ssize_t>(count)));
    for (std::size_t i = 0; i < count; ++i) tuple_items(tuple.get())[i] = compat::new_ref(items[i]);
    return tuple;
}

// A tuple, or list, that takes over the references to `children`; null with the references dropped on
// error.
inline PyObject* steal_into_tuple(PyObject** children, std::size_t count) noexcept {
    PyObject* tuple = new_tuple_of(children, count);
    if (OPTREE_UNLIKELY(tuple == nullptr)) drop_children(children, count);
    return tuple;
}

inline PyObject* steal_into_list(PyObject** children, std::size_t count) noexcept {
    PyObject* list = new_list_of(children, count);
    if (OPTREE_UNLIKELY(list == nullptr)) drop_children(children, count);
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
