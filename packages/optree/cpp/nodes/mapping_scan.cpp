// SPDX-License-Identifier: Apache-2.0
// Makes layouts from mappings.
#include <algorithm>

#include "nodes/gather.h"
#include "nodes/look_ahead.h"
#include "nodes/sort_keys.h"

namespace optree {
namespace {

// Makes the layout of keys for which Python code may run: `<` of the keys, or a collection. Pushes
// the values in traversal order.
Ref scan_by_python(LayoutCache& cache, LayoutTypes types, ObjectStack& keys, ObjectStack& unordered,
                   bool sorted, ObjectStack& values) {
    Ref owner = make_layout(types, keys.data(), keys.size(), sorted);
    cache.offer(as_layout(owner.get()));
    const auto* layout = reinterpret_cast<KeyLayout*>(owner.get());
    const std::size_t base = values.extend(keys.size());
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        values[base + layout->child_of(i)] = unordered[i];
    }
    unordered.forget_from(0);
    return owner;
}

// A cached layout whose keys are equal but other objects, borrowed; null if there is none. Writes
// the values (borrowed) to `out`. Keys, which are read here, and values, which are read next, are
// prefetched in batches. This halves the time of a first visit with equal keys (benchmarks/optree).
KeyLayout* gather_by_twin(LayoutCache& cache, const DictEntries& entries, PyObject* mapping,
                          PyObject* first, bool sorted, PyObject** out) {
    constexpr std::uint32_t kBatch = 32;
    const std::uint32_t size = checked_count(static_cast<std::size_t>(PyDict_GET_SIZE(mapping)));
    entries.prefetch(0, std::min(kBatch, size));
    if (!is_atomic(first)) return nullptr;
    const auto same = [&](std::uint32_t i, PyObject* key, PyObject* expected) {
        if (i % kBatch == 0) entries.prefetch(i, std::min(kBatch, size - i));
        return same_atomic(key, expected);
    };
    for (KeyLayout* twin : cache.twin_set(PyObject_Hash(first), size, sorted)) {
        if (twin == nullptr) return nullptr;
        if (twin->size == size && twin->sorted == sorted &&
            keys_match(twin, entries, mapping, out, same)) {
            return twin;
        }
    }
    return nullptr;
}

}  // namespace

bool push_known_values(const KeyLayout* layout, PyObject* mapping, ObjectStack& values) {
    const CriticalSection reading(mapping);
    const std::size_t size = layout->size;
    if (PyDict_GET_SIZE(mapping) != static_cast<Py_ssize_t>(size)) return false;
    if (size == 0) return true;
    values.reserve(size);
    PyObject** out = values.data() + values.size();
    if (!keys_match(layout, entries_of(mapping), mapping, out, identical)) return false;
    for (std::size_t i = 0; i < size; ++i) Py_INCREF(out[i]);
    values.adopt(size);
    return true;
}

Ref scan_unknown(LayoutCache& cache, LayoutTypes types, PyObject* mapping, bool sorted,
                 ObjectStack& values) {
    ObjectStack own_keys;
    ObjectStack own_values;
    {
        const CriticalSection reading(mapping);  // while keys and values are borrowed
        const auto size = static_cast<std::size_t>(PyDict_GET_SIZE(mapping));
        if (size == 0) return Ref::borrow(cache.empty.get());
        const DictEntries entries = entries_of(mapping);
        PyObject* first = first_key(entries, mapping);
        values.reserve(size);
        PyObject** out = values.data() + values.size();
        KeyLayout* twin = gather_by_twin(cache, entries, mapping, first, sorted, out);
        // Trees that are visited repeatedly should find their own keys; others share the twin's.
        // Equal keys may reuse the addresses of keys that died, so a second hit proves nothing.
        // Making layouts after two hits took a quarter of a first visit with equal keys
        // (benchmarks/optree).
        Ref owner;
        if (twin != nullptr && cache.meet(twin, first) < 3) {
            owner = Ref::borrow(reinterpret_cast<PyObject*>(twin));
        } else {
            Scratch<PyObject*, 64> keys;
            Scratch<PyObject*, 64> unordered;
            keys.reserve(size);
            unordered.reserve(size);
            visit_items(entries, mapping, checked_count(size),
                        [&](std::uint32_t, PyObject* key, PyObject* value) {
                            keys.push_unchecked(key);
                            unordered.push_unchecked(value);
                            return true;
                        });
            KeyOrder order;
            if (twin != nullptr) {
                owner = make_layout_in_order(types, keys.data(), size, twin->order, twin->sorted);
            } else {
                const Plain plain = sorted ? sort_plain_keys(keys.data(), size, order)
                                    : std::all_of(keys.begin(), keys.end(), is_atomic)
                                        ? Plain::in_order
                                        : Plain::not_plain;
                if (plain != Plain::not_plain) {
                    owner = make_layout_in_order(types, keys.data(), size,
                                                 plain == Plain::permuted ? order.data() : nullptr,
                                                 sorted);
                    const auto* layout = reinterpret_cast<KeyLayout*>(owner.get());
                    for (std::uint32_t i = 0; i < layout->size; ++i) {
                        out[layout->child_of(i)] = unordered[i];
                    }
                } else {
                    for (std::size_t i = 0; i < size; ++i) {
                        own_keys.push(keys[i]);
                        own_values.push(unordered[i]);
                    }
                }
            }
        }
        if (owner) {
            take_references(out, out, size);
            look_at_keys(out, size);
            values.adopt(size);
            // Python code may run from here on: the cache asks large ints for their size.
            if (twin == nullptr) {
                cache.offer(as_layout(owner.get()));
            } else if (owner.get() != reinterpret_cast<PyObject*>(twin)) {
                cache.keep(as_layout(owner.get()));
            }
            return owner;
        }
    }
    return scan_by_python(cache, types, own_keys, own_values, sorted, values);
}

}  // namespace optree
