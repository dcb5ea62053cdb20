// SPDX-License-Identifier: Apache-2.0
// Registered classes that consist only of their attributes: dataclasses and classes made by attrs.
// They are taken apart and rebuilt here as the Python functions of `optree/_field_nodes.py` would,
// without calling these: 5x of flatten and unflatten (benchmarks/optree, 1000 dataclasses).
#pragma once

#include <memory>
#include <vector>

#include "nodes/sequence.h"

namespace optree {

// Whether instances are made by just setting their attributes, and the facts behind the decision.
struct PlainInit {
    unsigned int version = 0;  // of the class; 0: not decided
    bool yes = false;
    initproc tp_init = nullptr;
    Ref init;   // a weak reference to `__init__`, which may lead back to the class
    Ref code;   // its code
    Ref cells;  // a tuple of what its closure held

    // Whether `__init__` is still what it was.
    bool holds(PyTypeObject* cls) const noexcept;
};

struct Attributes {
    Ref children;     // names of the attributes that are children, a tuple of str
    Ref metadata;     // names of the other attributes that `__init__` has
    Ref parameters;   // what `__init__` calls all of these
    Ref is_plain;     // is_plain(cls): whether `__init__` just sets them; null: it does more
    Ref placeholder;  // the value in whose place `__init__` sets another; null: none
    std::vector<std::uint32_t> order;  // in which it sets them, counted in children, then metadata
    Lock lock;                         // held by who changes `plain`
    Published<PlainInit> plain;

    // From (children, metadata, parameters, order, is_plain or None, placeholder or None) as Python
    // gives it.
    static std::unique_ptr<Attributes> parse(PyObject* description);

    std::uint32_t expand(PyObject* object, ObjectStack& out, Ref* slots) const;
    // Whether `rebuild` does what the Python function would for this metadata.
    bool fits(PyObject* node_metadata, std::size_t count) const noexcept;
    // A new `cls` that takes over the children; null on error.
    PyObject* rebuild(PyTypeObject* cls, PyObject* node_metadata, PyObject** items,
                      std::size_t count);
    int traverse(visitproc visit, void* arg) const;

  private:
    bool makes_plainly(PyTypeObject* cls);
    bool decide(PyTypeObject* cls);
    bool has_placeholder(PyObject* node_metadata, PyObject* const* items) const noexcept;
    PyObject* make_plainly(PyTypeObject* cls, PyObject* node_metadata,
                           PyObject* const* items) const;
    PyObject* name(std::size_t index) const noexcept {
        const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(children.get()));
        return index < count ? tuple_items(children.get())[index]
                             : tuple_items(metadata.get())[index - count];
    }
};

}  // namespace optree
