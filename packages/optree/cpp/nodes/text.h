// SPDX-License-Identifier: Apache-2.0
// Text of nodes, in UTF-8.
#pragma once

#include <string>
#include <vector>

#include "nodes/layout.h"

namespace optree {

// The texts of the children of a node.
using Texts = std::vector<std::string>;

// Encodes lone surrogates as Python's surrogatepass does.
std::string utf8(PyObject* text);
std::string repr_of(PyObject* object);
std::string attribute_text(PyObject* object, const char* name);

std::string joined(const Texts& children);
// {'key': child, ...}
std::string braces(const KeyLayout* layout, const Texts& children);
// name({'key': child, ...}), or name() without children.
std::string call_of_braces(const char* name, const KeyLayout* layout, const Texts& children);
// name(field=child, ...)
std::string with_fields(const std::string& name, PyObject* fields, const Texts& children);

// One step of a path as Python code: [entry], or .name for a field.
Ref step_of_entry(PyObject* entry);
Ref step_of_field(PyObject* name);

}  // namespace optree
