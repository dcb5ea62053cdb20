// SPDX-License-Identifier: Apache-2.0
// Fused maps over one or several trees.
#pragma once

#include "walk/flatten.h"

namespace optree {

// unflatten(map(func, leaves(tree), *up_to(rests))). All trees are read, and every mismatch is
// reported, before the first call of `func`; calls of `func` and of unflatten functions alternate in
// post-order.
Ref tree_map(Context& context, PyObject* func, PyObject* tree, PyObject* rests);

// The same calls for their side effects.
void tree_map_inplace(Context& context, PyObject* func, PyObject* tree, PyObject* rests);

}  // namespace optree
