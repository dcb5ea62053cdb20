// SPDX-License-Identifier: Apache-2.0
// Makes a structure from one level of a container whose children are structures.
#pragma once

#include "walk/spec_object.h"

namespace optree {

Ref spec_from_collection(Context& context, PyObject* collection);

}  // namespace optree
