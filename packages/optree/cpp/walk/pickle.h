// SPDX-License-Identifier: Apache-2.0
// Converts the state of a spec to plain Python objects and back. Everything read is checked.
#pragma once

#include "walk/spec_object.h"

namespace optree {

// (node states in post-order, none_is_leaf, namespace). A node state is (kind, arity, node_data,
// node_entries, custom_type, num_leaves, num_nodes, original_keys). With `for_pickle`, the result
// has the form that is fastest to pickle.
Ref spec_getstate(const SpecObject& spec, bool for_pickle);
// (copyreg.__newobj__, (PyTreeSpec,), state), for every protocol.
Ref spec_reduce(PyObject* self, bool for_pickle);
// Fills a spec made by __new__. Accepts both forms, and node states without original_keys, which
// older releases wrote.
void spec_setstate(SpecObject& spec, PyObject* state);

}  // namespace optree
