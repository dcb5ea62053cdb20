// SPDX-License-Identifier: Apache-2.0
// Takes one node apart for Python code.
#pragma once

#include "nodes/context.h"

namespace optree {

// Stores the classes and handlers that the Python part defines. `handlers` holds two tuples with
// one item for each kind: None, or (unflatten function, dict of extra attributes). The first tuple
// is for dicts in sorted key order, the second for dicts in insertion order.
void set_one_level(State& state, PyObject* output_class, PyObject* metadata_class,
                   PyObject* const* handlers);

// Whether `set_one_level` was called and the interpreter still has its definitions.
inline bool knows_one_level(const State& state) noexcept {
    return static_cast<bool>(state.one_level.output_class);
}

// The FlattenOneLevelOutputEx of a node. Raises ValueError for a leaf.
Ref flatten_one_level(Context& context, PyObject* tree);

}  // namespace optree
