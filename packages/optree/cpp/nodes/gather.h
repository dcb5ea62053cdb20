// SPDX-License-Identifier: Apache-2.0
// Reads the items of a mapping and matches them with a key layout.
#pragma once

#include "cpython/dict_table.h"
#include "cpython/trials.h"
#include "nodes/layout.h"

namespace optree {

// Calls visit(i, key, value) for the `size` items of a mapping in insertion order until it returns
// false. Returns whether all items were visited.
template <class Visit>
OPTREE_INLINE bool visit_items(const DictEntries& entries, PyObject* mapping, std::uint32_t size,
                               Visit&& visit) noexcept {
    if (OPTREE_LIKELY(static_cast<bool>(entries))) return entries.for_each(size, visit);
    if (entries.holey != nullptr) return entries.for_each_but_holes(size, visit);
    Py_ssize_t pos = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    for (std::uint32_t i = 0; i < size; ++i) {
        if (!PyDict_Next(mapping, &pos, &key, &value) || !visit(i, key, value)) return false;
    }
    return true;
}

OPTREE_INLINE DictEntries entries_of(PyObject* mapping) noexcept {
    return trials.dict_table.held() ? dict_entries(mapping) : DictEntries();
}

inline PyObject* first_key(const DictEntries& entries, PyObject* mapping) noexcept {
    if (OPTREE_LIKELY(static_cast<bool>(entries))) return entries.first_key();
    Py_ssize_t pos = 0;
    PyObject* key = nullptr;
    PyDict_Next(mapping, &pos, &key, nullptr);  // skips holes
    return key;
}

// Whether the keys of `mapping` match those of `layout` in the same insertion order, compared by
// `same`. If so, writes the values (borrowed) to `out` in traversal order.
template <class Same>
OPTREE_INLINE bool keys_match(const KeyLayout* layout, const DictEntries& entries,
                              PyObject* mapping, PyObject** out, Same same) noexcept {
    PyObject* const* expected = layout->inserted;
    const std::uint32_t* position = layout->position;
    if (position == nullptr) {
        return visit_items(entries, mapping, layout->size,
                           [=](std::uint32_t i, PyObject* key, PyObject* value) {
                               out[i] = value;
                               return same(i, key, expected[i]);
                           });
    }
    return visit_items(entries, mapping, layout->size,
                       [=](std::uint32_t i, PyObject* key, PyObject* value) {
                           out[position[i]] = value;
                           return same(i, key, expected[i]);
                       });
}

// The same by identity, for entries that can be read in any order. The values are read in traversal
// order rather than written in it. Stores to addresses that had to be loaded first stalled the
// following loads, which took a quarter of the time on a dict of two.
OPTREE_INLINE bool keys_match(const KeyLayout* layout, const TextEntries& entries,
                              PyObject** out) noexcept {
    PyObject* const* expected = layout->inserted;
    if (const std::uint32_t* order = layout->order) {
        return entries.for_each(layout->size, [=](std::uint32_t i, PyObject* key, PyObject* value) {
            compat::prefetch(value);
            out[i] = entries.value(order[i]);
            return key == expected[i];
        });
    }
    return entries.for_each(layout->size, [=](std::uint32_t i, PyObject* key, PyObject* value) {
        out[i] = value;
        return key == expected[i];
    });
}

// A function object, so that it is inlined. A function was called for each key.
inline constexpr auto identical = [](std::uint32_t, PyObject* a, PyObject* b) noexcept {
    return a == b;
};

// The first cached layout for which `match` returns true.
template <class Match>
OPTREE_INLINE KeyLayout* find_layout(LayoutCache& cache, PyObject* first, PyObject* mapping,
                                     bool sorted, Match match) noexcept {
    const std::uint64_t shape =
        shape_of(static_cast<std::size_t>(PyDict_GET_SIZE(mapping)), sorted);
    for (KeyLayout* layout : cache.set(first, shape)) {
        if (layout == nullptr) return nullptr;
        if (layout->shape == shape && OPTREE_LIKELY(match(layout))) return layout;
    }
    return nullptr;
}

// For dicts with holes or with keys other than str. Kept out of the common path.
OPTREE_NOINLINE inline KeyLayout* gather_from_others(LayoutCache& cache, PyObject* mapping,
                                                     bool sorted, PyObject** out) noexcept {
    const DictEntries entries = entries_of(mapping);
    return find_layout(cache, first_key(entries, mapping), mapping, sorted,
                       [&](const KeyLayout* layout) {
                           return keys_match(layout, entries, mapping, out, identical);
                       });
}

// The cached layout of `mapping` (a dict or a subclass, not empty), borrowed; null if it is not
// cached. Writes the values (borrowed) to `out` in traversal order. Runs no Python code.
//
// Inlined into the walk, which saves 2 % of the instructions of flatten on module trees
// (benchmarks/optree).
OPTREE_INLINE KeyLayout* gather_known(LayoutCache& cache, PyObject* mapping, bool sorted,
                                      PyObject** out) noexcept {
    if (OPTREE_LIKELY(trials.dict_table.held())) {
        if (const TextEntries entries{mapping}; OPTREE_LIKELY(static_cast<bool>(entries))) {
            return find_layout(cache, entries.first_key(), mapping, sorted,
                               [&](const KeyLayout* layout) OPTREE_INLINE_LAMBDA {
                                   return keys_match(layout, entries, out);
                               });
        }
    }
    return gather_from_others(cache, mapping, sorted, out);
}

}  // namespace optree
