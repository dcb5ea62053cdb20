// SPDX-License-Identifier: Apache-2.0
// The subtrees of a tree at the leaf positions of a structure.
#pragma once

#include "walk/flatten.h"

namespace optree {

// Appends the subtrees of `object` (new references) to `out`, which then holds tree.leaves more, in
// order; raises ValueError where `object` does not start with the structure. The mismatch that is
// reported is the first from the right.
void flatten_up_to(Context& context, const TreeView& tree, PyObject* object, ObjectStack& out);

}  // namespace optree
