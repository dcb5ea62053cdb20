// SPDX-License-Identifier: Apache-2.0
// Public functions that are builtins: the call of a Python function that only passes its arguments on
// takes as long as flattening a small tree.
#pragma once

#include "nodes/state.h"

namespace optree {

// (State&, prototype) -> builtin. The prototype is a Python function of one of the names that this
// file knows; the builtin has its documentation and does the same, and calls it with arguments that
// are not the usual ones, so that every error is the prototype's. Pays for 1.6x of flatten on small
// trees (benchmarks/optree, tuple of 3).
Ref make_compiled(State& state, PyObject* prototype);

}  // namespace optree
