// SPDX-License-Identifier: Apache-2.0
// One node taken apart for Python code.
#pragma once

#include "nodes/context.h"

namespace optree {

// What the Python part of the library defines for its classes and for each kind of nodes: `handlers` are two
// tuples with an item a kind, None or (unflatten function, dict of further attributes); the first for
// dicts in the order of their sorted keys, the second for dicts in insertion order.
void set_one_level(State& state, PyObject* output_class, PyObject* metadata_class,
                   PyObject* const* handlers);

// Whether `set_one_level` was called and the interpreter still has its definitions.
inline bool knows_one_level(const State& state) noexcept {
    return static_cast<bool>(state.one_level.output_class);
}

// The FlattenOneLevelOutputEx of a node; a ValueError for a leaf.
Ref flatten_one_level(Context& context, PyObject* tree);

}  // namespace optree
