// SPDX-License-Identifier: Apache-2.0
// The documented total order of mapping keys.
#pragma once

#include <cstdint>
#include <vector>

#include "support/ref.h"

namespace optree {

// Finds the traversal order of `size` keys: Python's `<` where it is defined for all of them, else
// the class name and then `<`, else the order given. Each attempt works on a copy. Errors other
// than TypeError propagate. Returns false, with `order` unspecified, when the keys already stand in
// that order; else order[child] is the index of the child's key.
bool sort_keys(PyObject* const* keys, std::size_t size, std::vector<std::uint32_t>& order);

// A sorted copy of a list by the same rules.
Ref sorted_list(PyObject* list);

}  // namespace optree
