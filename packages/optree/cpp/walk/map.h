// SPDX-License-Identifier: Apache-2.0
// Map functions over one or several trees without intermediate lists.
#pragma once

#include "walk/flatten.h"

namespace optree {

// unflatten(map(func, leaves(tree), *up_to(rests))). Reads all trees and reports every mismatch
// before the first call of `func`. Rebuilds containers after the last call.
Ref tree_map(Context& context, PyObject* func, PyObject* tree, PyObject* rests);

// The results of func(*row) for the rows of a list of lists of equal lengths, as a list. Unlike
// zip, it exposes no partly filled tuple to the garbage collector.
Ref call_rows(PyObject* func, PyObject* columns);

// Makes the same calls as tree_map, for their side effects.
void tree_map_inplace(Context& context, PyObject* func, PyObject* tree, PyObject* rests);

}  // namespace optree
