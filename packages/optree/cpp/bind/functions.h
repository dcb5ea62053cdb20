// SPDX-License-Identifier: Apache-2.0
// The functions of the extension module, as builtins whose `self` is the state.
#pragma once

#include "nodes/state.h"
#include "support/errors.h"

namespace optree {

// Each table ends with a null entry.
extern PyMethodDef tree_functions[];      // flatten, map, ...: called often
extern PyMethodDef registry_functions[];  // register_node, is_namedtuple, ...: called rarely

// Runs the body of a builtin: `body(state)` returns a new reference or throws.
template <class Body>
OPTREE_INLINE PyObject* with_state(PyObject* self, Body&& body) {
    State& state = as_state(self);
    return guarded(state.error(), [&] { return body(state); });
}

}  // namespace optree
