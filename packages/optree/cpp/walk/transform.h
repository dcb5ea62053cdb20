// SPDX-License-Identifier: Apache-2.0
// Applies functions to the nodes and leaves of a structure, or of the tree that it rebuilds.
#pragma once

#include "walk/spec_object.h"

namespace optree {

// Passes the one-level nodes and leaves of a structure through the functions (null: unchanged).
Ref spec_transform(const SpecObject& spec, PyObject* f_node, PyObject* f_leaf);
// Rebuilds a tree and passes leaves and containers through the functions (null: unchanged).
Ref spec_traverse_leaves(const SpecObject& spec, PyObject* leaves, PyObject* f_node,
                         PyObject* f_leaf);
// The same, but calls f_node(node_type, node_data, children) instead of building the container.
Ref spec_walk(const SpecObject& spec, PyObject* leaves, PyObject* f_node, PyObject* f_leaf);

}  // namespace optree
