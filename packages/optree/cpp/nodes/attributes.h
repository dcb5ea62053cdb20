// SPDX-License-Identifier: Apache-2.0
// Registered classes that are no more than their attributes: dataclasses and classes made by attrs.
// They are taken apart and rebuilt here as the Python functions of `optree/_field_nodes.py` would,
// without calling these: 5x of flatten and unflatten (benchmarks/optree, 1000 dataclasses).
#pragma once

#include <memory>
#include <vector>

#include "nodes/sequence.h"

namespace optree {

struct Attributes {
    Ref children;    // names of the attributes that are children, a tuple of str
    Ref metadata;    // names of the other attributes that `__init__` has
    Ref parameters;  // what `__init__` calls all of these
    Ref is_plain;    // is_plain(cls): whether `__init__` just sets them; null: it does more
    std::vector<std::uint32_t> order;  // in which it sets them, counted in children, then metadata
    // The version of the class (32 bits) for which `is_plain` was asked, and the answer (1). Zero:
    // not asked.
    std::atomic<std::uint64_t> plain{0};

    // From (children, metadata, parameters, order, is_plain or None) as Python gives it.
    static std::unique_ptr<Attributes> parse(PyObject* description);

    std::uint32_t expand(PyObject* object, ObjectStack& out, Payload& payload) const;
    // Whether `rebuild` does what the Python function would for this metadata.
    bool fits(PyObject* node_metadata, std::size_t count) const noexcept;
    // A new `cls` that takes over the children; null on error.
    PyObject* rebuild(PyTypeObject* cls, PyObject* node_metadata, PyObject** items,
                      std::size_t count);

  private:
    bool makes_plainly(PyTypeObject* cls);
    PyObject* make_plainly(PyTypeObject* cls, PyObject* node_metadata,
                           PyObject* const* items) const;
    PyObject* name(std::size_t index) const noexcept {
        const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(children.get()));
        return index < count ? tuple_items(children.get())[index]
                             : tuple_items(metadata.get())[index - count];
    }
};

}  // namespace optree
