// SPDX-License-Identifier: Apache-2.0
// The subtrees of a tree at the positions of a structure's leaves.
#pragma once

#include "walk/flatten.h"

namespace optree {

// Appends the subtrees of `object` (new references) to `out` in order, which adds tree.leaves
// items. Raises ValueError if `object` does not start with the structure. The first mismatch from
// the right is reported.
void flatten_up_to(Context& context, const TreeView& tree, PyObject* object, ObjectStack& out);

}  // namespace optree
