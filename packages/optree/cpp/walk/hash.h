// SPDX-License-Identifier: Apache-2.0
// Hash of a structure.
#pragma once

#include "walk/spec_object.h"

namespace optree {

Py_hash_t spec_hash(SpecObject& spec);

}  // namespace optree
