// SPDX-License-Identifier: Apache-2.0
// The options that most functions of trees have, as a call gives them.
#pragma once

#include "nodes/context.h"
#include "support/arguments.h"

namespace optree {

// (is_leaf, none_is_leaf, namespace) from options[0] on; null where not given.
class CallContext {
  public:
    CallContext(State& state, PyObject* const* options)
        : name_(exact_str(options[2], state.empty_str.get(), "namespace")),
          context(state, as_predicate(options[0], "is_leaf"), as_bool(options[1], "none_is_leaf"),
                  name_.get()) {}

  private:
    Ref name_;

  public:
    Context context;
};

}  // namespace optree
