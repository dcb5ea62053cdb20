// SPDX-License-Identifier: Apache-2.0
// Fused maps over one or several trees.
#pragma once

#include "walk/flatten.h"

namespace optree {

// unflatten(map(func, leaves(tree), *up_to(rests))). All trees are read, and every mismatch is
// reported, before the first call of `func`; containers are rebuilt after the last.
Ref tree_map(Context& context, PyObject* func, PyObject* tree, PyObject* rests);

// The results of func(*row) for the rows of a list of lists of equal lengths, as a list. Unlike zip, it
// shows no half-filled tuple to the garbage collector.
Ref call_rows(PyObject* func, PyObject* columns);

// The same calls as tree_map, for their side effects.
void tree_map_inplace(Context& context, PyObject* func, PyObject* tree, PyObject* rests);

}  // namespace optree
