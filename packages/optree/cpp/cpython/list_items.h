// SPDX-License-Identifier: Apache-2.0
// The items of a list: an array that can be read and filled, and a block that can be handed to a
// list.
#pragma once

#include <cstring>

#include "cpython/trials.h"

namespace optree {

// The items of a list that no other thread changes. Also valid for the unset items of a new list.
OPTREE_INLINE PyObject** list_items(PyObject* list) noexcept {
    return reinterpret_cast<PyListObject*>(list)->ob_item;
}

// Whether a list keeps its items in a plain block from PyMem_Malloc that can be handed to it.
// Handing over a block avoids zeroing memory that is overwritten at once and, for a large list, a
// copy. That is a sixth of the time of flatten on a list of 10,000 (benchmarks/optree).
#if !defined(PYPY_VERSION) && !defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x03100000
#define OPTREE_LIST_TAKES_ITEMS 1
#else
#define OPTREE_LIST_TAKES_ITEMS 0
#endif

OPTREE_INLINE bool list_takes_items() noexcept {
    return OPTREE_LIST_TAKES_ITEMS && OPTREE_LIKELY(trials.list_items.held());
}

// Hands a block of items to an empty list that is not visible yet.
inline void give_items([[maybe_unused]] PyObject* list, [[maybe_unused]] PyObject** items,
                       [[maybe_unused]] Py_ssize_t count) noexcept {
#if OPTREE_LIST_TAKES_ITEMS
    auto* made = reinterpret_cast<PyListObject*>(list);
    made->ob_item = items;
    made->allocated = count;
    Py_SET_SIZE(made, count);
#endif
}

// A list that takes over the references to `items`. Returns null and takes nothing on error.
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

// A list of new references to contiguous items. `find` returns the first item, or null if the items
// are gone. It is called after the allocation, because creating the list may start a collection.
// Returns null if `find` does, and null with an exception set on error. Only valid if
// `list_takes_items`.
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
