// SPDX-License-Identifier: Apache-2.0
// Functions applied to the nodes and leaves of a structure, or of the tree it rebuilds.
#pragma once

#include "walk/spec_object.h"

namespace optree {

// A structure whose one-level nodes and leaves went through the functions (null: unchanged).
Ref spec_transform(const SpecObject& spec, PyObject* f_node, PyObject* f_leaf);
// Rebuilds a tree; leaves and rebuilt containers go through the functions (null: unchanged).
Ref spec_traverse_leaves(const SpecObject& spec, PyObject* leaves, PyObject* f_node,
                         PyObject* f_leaf);
// Like the above, but f_node(node_type, node_data, children) stands for building the container.
Ref spec_walk(const SpecObject& spec, PyObject* leaves, PyObject* f_node, PyObject* f_leaf);

}  // namespace optree
