// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "nodes/layout.h"

namespace optree {
namespace {

// Includes the tuple of entries and the prototype (at most two thirds full), which may be made
// later.
std::size_t bytes_of(KeyLayout* layout) noexcept {
    if (layout->bytes == 0) {
        std::size_t bytes = sizeof(KeyLayout) + sizeof(PyTupleObject) + sizeof(PyDictObject) + 128;
        for (std::uint32_t i = 0; i < layout->size; ++i) {
            const std::size_t key = bytes_of_key(layout->inserted[i]);
            bytes += key < SIZE_MAX / 2 - bytes ? key : SIZE_MAX / 2 - bytes;
        }
        layout->bytes = bytes + std::size_t{layout->size} * 10 * sizeof(PyObject*);
    }
    return layout->bytes;
}

}  // namespace

KeyLayout* LayoutCache::find(PyObject* const* keys, std::size_t size) noexcept {
    if (size == 0) return reinterpret_cast<KeyLayout*>(empty.get());
    for (KeyLayout* layout : set(keys[0], shape_of(size, false))) {
        if (layout == nullptr) return nullptr;
        if (layout->shape == shape_of(size, false) &&
            std::equal(keys, keys + size, layout->inserted)) {
            return layout;
        }
    }
    return nullptr;
}

unsigned LayoutCache::meet(const KeyLayout* layout, PyObject* first) noexcept {
    const auto hash = static_cast<std::uint64_t>(PyObject_Hash(first));
    const auto address = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(first));
    return meet(met_keys_, mix(address ^ hash, layout->size, layout->sorted));
}

void LayoutCache::keep(KeyLayout* layout) noexcept {
    insert(set(layout->inserted[0], layout->shape), layout);
}

void LayoutCache::offer(KeyLayout* layout) noexcept {
    if (!layout->atomic || layout->size == 0) return;
    PyObject* first = layout->inserted[0];
    if (meet(layout, first) != 0) keep(layout);
    const Py_hash_t hash = PyObject_Hash(first);
    if (meet(met_twins_, mix(static_cast<std::uint64_t>(hash), layout->size, layout->sorted)) !=
        0) {
        insert(twin_set(hash, layout->size, layout->sorted), layout);
    }
}

void LayoutCache::insert(Set& set, KeyLayout* layout) noexcept {
    const std::size_t bytes = bytes_of(layout);
    if (bytes > kMaxLayoutBytes) return;
    if (bytes_ + bytes > kMaxBytes) clear();
    KeyLayout* oldest = set[kWays - 1];
    for (std::size_t way = kWays - 1; way > 0; --way) set[way] = set[way - 1];
    Py_INCREF(reinterpret_cast<PyObject*>(layout));
    set[0] = layout;
    bytes_ += bytes;
    if (oldest != nullptr) {
        bytes_ -= bytes_of(oldest);
        Py_DECREF(reinterpret_cast<PyObject*>(oldest));
    }
}

void LayoutCache::clear() noexcept {
    for (auto* table : {&sets_, &twins_}) {
        for (Set& set : *table) {
            for (KeyLayout*& layout : set) {
                PyObject* old = reinterpret_cast<PyObject*>(layout);
                layout = nullptr;
                Py_XDECREF(old);
            }
        }
    }
    bytes_ = 0;
    met_keys_.fill({});
    met_twins_.fill({});
}

}  // namespace optree
