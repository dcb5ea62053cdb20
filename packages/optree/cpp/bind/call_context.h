// SPDX-License-Identifier: Apache-2.0
// The options that most tree functions share, as passed in one call.
#pragma once

#include "nodes/context.h"
#include "support/arguments.h"

namespace optree {

// Reads (is_leaf, none_is_leaf, namespace) starting at options[0]. An option that was not passed is
// null.
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
