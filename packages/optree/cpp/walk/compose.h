// SPDX-License-Identifier: Apache-2.0
// New structures from old ones.
#pragma once

#include "walk/spec_object.h"

namespace optree {

// Every leaf of `outer` replaced by `inner`.
Ref spec_compose(const SpecObject& outer, const SpecObject& inner);
// The smallest structure of which both are prefixes.
Ref spec_broadcast(const SpecObject& a, const SpecObject& b);

Ref spec_children(const SpecObject& spec);  // list
Ref spec_child(const SpecObject& spec, Py_ssize_t index);
Ref spec_one_level(const SpecObject& spec);  // None for a leaf

// The namespace of a combination of both; raises ValueError where they differ or a custom node of
// the one without a namespace is registered differently in the other's.
PyObject* merged_namespace(const SpecObject& a, const SpecObject& b);

}  // namespace optree
