// SPDX-License-Identifier: Apache-2.0
// The Python object PyTreeIter, which returns the leaves of a tree one at a time.
#pragma once

#include "walk/spec_object.h"

namespace optree {

// An iterator over `tree`. Reads the dict mode now, and the children of a container when it reaches
// them.
Ref new_iter(State& state, PyObject* tree, PyObject* predicate, bool none_is_leaf, PyObject* name);

Ref make_iter_type();

}  // namespace optree
