// SPDX-License-Identifier: Apache-2.0
// Public functions as builtins. Calling a Python function that only forwards its arguments takes as
// long as flattening a small tree.
#pragma once

#include "nodes/state.h"

namespace optree {

// (State&, prototype) -> builtin. The prototype is a Python function with one of the names that
// compiled.cpp knows. The builtin has the same documentation and does the same work. It calls the
// prototype when the arguments are unusual, so every error message is the prototype's. Makes
// flatten 1.6x faster on small trees (benchmarks/optree, tuple of 3).
Ref make_compiled(State& state, PyObject* prototype);

}  // namespace optree
