// SPDX-License-Identifier: Apache-2.0
// The order of an OrderedDict: a linked list that CPython does not expose. After move_to_end it
// differs from the order of the underlying dict. The iterator protocol returns this order too, but
// takes several times as long (benchmarks/optree, ResNet module trees). Callers check
// `trials.odict_list` first and otherwise use the iterator.
//
// The list matches the dict unless a program bypassed the OrderedDict, for example with
// dict.__setitem__ or dict.popitem. This is detected: the list and the dict have different keys, or
// items were removed from the table (`only_grew`). The iterator is used then and may raise its
// KeyError.
#pragma once

#include <utility>

#include "cpython/dict_table.h"
#include "cpython/trials.h"

// CPython 3.9 to 3.15, where `only_grew` can be computed for the underlying dict.
#define OPTREE_ODICT_LIST OPTREE_DICT_KEYS
// Where the underlying dict can be written.
#define OPTREE_ODICT_FILL (OPTREE_DICT_KEYS && OPTREE_DICT_ENTRIES)

namespace optree {

#if OPTREE_ODICT_LIST
namespace odict_internals {

struct Node {
    PyObject* key;
    Py_hash_t hash;
    Node* next;
    Node* previous;
};

struct Head {
    PyDictObject dict;
    Node* first;
    Node* last;
    Node** fast_nodes;
    Py_ssize_t fast_nodes_size;
    void* resize_sentinel;
    std::size_t changes;
    PyObject* inst_dict;
    PyObject* weakreflist;
};

OPTREE_INLINE const Node* first_of(PyObject* object) noexcept {
    return reinterpret_cast<Head*>(object)->first;
}

OPTREE_INLINE void free_nodes(Node* node) noexcept {
    while (node != nullptr) PyMem_Free(std::exchange(node, node->next));
}

// `count` contiguous nodes without keys; null if memory runs out.
OPTREE_INLINE Node* new_nodes(std::uint32_t count) noexcept {
    Node* first = nullptr;
    for (; count != 0; --count) {
        auto* node = static_cast<Node*>(PyMem_Malloc(sizeof(Node)));
        if (OPTREE_UNLIKELY(node == nullptr)) {
            free_nodes(first);
            return nullptr;
        }
        node->next = first;
        first = node;
    }
    return first;
}

}  // namespace odict_internals

// Whether the list has no keys.
OPTREE_INLINE bool odict_is_empty(PyObject* object) noexcept {
    return odict_internals::first_of(object) == nullptr;
}

// Whether the list has exactly these key objects in this order.
OPTREE_INLINE bool odict_has(PyObject* object, PyObject* const* keys, std::size_t size) noexcept {
    const odict_internals::Node* node = odict_internals::first_of(object);
    for (PyObject* const* end = keys + size; keys != end; ++keys) {
        if (OPTREE_UNLIKELY(node == nullptr || node->key != *keys)) return false;
        node = node->next;
    }
    return node == nullptr;
}
#else
inline bool only_grew(PyObject*) noexcept { return false; }
inline bool odict_is_empty(PyObject*) noexcept { return false; }
inline bool odict_has(PyObject*, PyObject* const*, std::size_t) noexcept { return false; }
#endif

#if OPTREE_ODICT_FILL
// A new OrderedDict with the `size` keys of `prototype`, which must satisfy the conditions of
// `dict_like`, and values as there. Returns null with MemoryError set, without calling `value`, if
// memory runs out.
//
// The index from the table to the list is not built: the OrderedDict builds it when it first looks
// up a key in the list. Makes unflatten a third faster on module trees (benchmarks/optree).
template <class Value>
OPTREE_INLINE PyObject* odict_like(PyObject* prototype, std::uint32_t size,
                                   Value&& value) noexcept {
    PyObject* made = PyODict_New();
    if (OPTREE_UNLIKELY(made == nullptr)) return nullptr;
    odict_internals::Node* node = odict_internals::new_nodes(size);
    bool in_cycles = false;  // an OrderedDict is tracked from its creation
    if (OPTREE_UNLIKELY(node == nullptr ||
                        !dict_internals::fill_like(made, prototype, size, value, in_cycles))) {
        odict_internals::free_nodes(node);
        Py_DECREF(made);
        return PyErr_NoMemory();
    }
    auto* head = reinterpret_cast<odict_internals::Head*>(made);
    head->first = node;
    const DictEntries entries = dict_entries(prototype);
    entries.for_each(size, [&](std::uint32_t, PyObject*& key, PyObject*) {
        Py_INCREF(key);
        node->key = key;
        node->hash = entries.hash(key);
        node->previous = head->last;
        head->last = node;
        node = node->next;
        return true;
    });
    return made;
}
#else
template <class Value>
PyObject* odict_like(PyObject*, std::uint32_t, Value&&) noexcept {
    return nullptr;
}
#endif

OPTREE_INLINE bool odict_list_is_readable() noexcept {
    return OPTREE_ODICT_LIST && OPTREE_LIKELY(trials.odict_list.held());
}

OPTREE_INLINE bool odict_list_is_writable() noexcept {
    return OPTREE_ODICT_FILL && OPTREE_LIKELY(trials.odict_list.held() && trials.dict_table.held());
}

}  // namespace optree
