// SPDX-License-Identifier: Apache-2.0
// One node taken apart for Python code.
#pragma once

#include "nodes/context.h"

namespace optree {

// What Python's part of the library says of its classes: `pairs` are the (unflatten function, dict of
// further attributes) of tuple, list and dict nodes.
void set_one_level(State& state, PyObject* output_class, PyObject* metadata_class,
                   PyObject* const* pairs);

// The FlattenOneLevelOutputEx of a tuple, a list, or a dict in sorted order; None for anything else.
Ref flatten_one_level(Context& context, PyObject* tree);

}  // namespace optree
