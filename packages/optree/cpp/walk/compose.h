// SPDX-License-Identifier: Apache-2.0
// Makes new structures from existing ones.
#pragma once

#include "walk/spec_object.h"

namespace optree {

// Replaces every leaf of `outer` by `inner`.
Ref spec_compose(const SpecObject& outer, const SpecObject& inner);
// The smallest structure that both are prefixes of.
Ref spec_broadcast(const SpecObject& a, const SpecObject& b);

Ref spec_children(const SpecObject& spec);  // list
Ref spec_child(const SpecObject& spec, Py_ssize_t index);
Ref spec_one_level(const SpecObject& spec);  // None for a leaf

// The namespace of a combination of both. Raises ValueError if they differ, or if a custom node of
// the spec without a namespace has another registration in the namespace of the other.
PyObject* merged_namespace(const SpecObject& a, const SpecObject& b);

}  // namespace optree
