// SPDX-License-Identifier: Apache-2.0
// The items of a list: an array that can be read and filled, and a block that can be given.
#pragma once

#include <cstring>

#include "cpython/trials.h"

namespace optree {

// The items of a list that no other thread changes; also the empty places of a new one.
OPTREE_INLINE PyObject** list_items(PyObject* list) noexcept {
    return reinterpret_cast<PyListObject*>(list)->ob_item;
}

// Whether a list keeps its items in a plain block of PyMem_Malloc that it can be given. Saves the
// zeroing of a block that is overwritten at once and, for a large one, its copy: a sixth of
// flatten on a list of 10,000 (benchmarks/optree).
#if !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x03100000
#define OPTREE_LIST_TAKES_ITEMS 1
#else
#define OPTREE_LIST_TAKES_ITEMS 0
#endif

OPTREE_INLINE bool list_takes_items() noexcept {
    return OPTREE_LIST_TAKES_ITEMS && OPTREE_LIKELY(trials.list_items.held());
}

// Gives its items to an empty list that is not visible yet.
inline void give_items([[maybe_unused]] PyObject* list, [[maybe_unused]] PyObject** items,
                       [[maybe_unused]] Py_ssize_t count) noexcept {
#if OPTREE_LIST_TAKES_ITEMS
    auto* made = reinterpret_cast<PyListObject*>(list);
    made->ob_item = items;
    made->allocated = count;
    Py_SET_SIZE(made, count);
#endif
}

// A list that takes over the references to `items`; null, and nothing taken, on error.
inline PyObject* new_list_of(PyObject* const* items, std::size_t count) noexcept {
    const bool give = list_takes_items() && count != 0;
    PyObject* list = PyList_New(give ? 0 : static_cast<Py_ssize_t>(count));
    if (OPTREE_UNLIKELY(list == nullptr) || count == 0) return list;
    if (give) {
        void* block = PyMem_Malloc(count * sizeof(PyObject*));
        if (OPTREE_UNLIKELY(block == nullptr)) {
            Py_DECREF(list);
            return PyErr_NoMemory();
        }
        std::memcpy(block, items, count * sizeof(PyObject*));
        give_items(list, static_cast<PyObject**>(block), static_cast<Py_ssize_t>(count));
    } else {
        std::memcpy(static_cast<void*>(list_items(list)), items, count * sizeof(PyObject*));
    }
    return list;
}

// A list of more references to items that stand in a row. `find` returns the first of them, or null where
// they are gone: it is asked when the memory is there, since making the list may start a collection. Null
// then, or with an error set. Asked for where `list_takes_items`.
template <class Find>
OPTREE_NOINLINE PyObject* copied_list(std::size_t count, Find&& find) noexcept {
    PyObject* list = PyList_New(0);
    if (OPTREE_UNLIKELY(list == nullptr)) return nullptr;
    auto* block = static_cast<PyObject**>(PyMem_Malloc(count * sizeof(PyObject*)));
    PyObject* const* items = block != nullptr ? find() : nullptr;
    if (OPTREE_UNLIKELY(items == nullptr)) {
        if (block == nullptr) PyErr_NoMemory();
        PyMem_Free(static_cast<void*>(block));
        Py_DECREF(list);
        return nullptr;
    }
    for (std::size_t i = 0; i < count; ++i) {
        Py_INCREF(items[i]);
        block[i] = items[i];
    }
    give_items(list, block, static_cast<Py_ssize_t>(count));
    return list;
}

}  // namespace optree
