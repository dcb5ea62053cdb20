// SPDX-License-Identifier: Apache-2.0
// The positions of the leaves: paths (tuples of entries), accessors, and the entries of the root.
#pragma once

#include "walk/spec_object.h"

namespace optree {

Ref spec_paths(const SpecObject& spec);      // list of tuples
Ref spec_accessors(const SpecObject& spec);  // list of PyTreeAccessor
Ref spec_entries(const SpecObject& spec);    // list
Ref spec_entry(const SpecObject& spec, Py_ssize_t index);

// Records how the classes of entries and accessors (a tuple of classes) create instances. While
// that does not change, instances are created without calling the classes.
void set_stock_classes(State& state, PyObject* classes);

}  // namespace optree
