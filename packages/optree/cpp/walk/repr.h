// SPDX-License-Identifier: Apache-2.0
// Text of a structure: PyTreeSpec({'a': *, 'b': (*, None)}, NoneIsLeaf, namespace='ns').
#pragma once

#include "walk/spec_object.h"

namespace optree {

Ref spec_repr(const SpecObject& spec);

}  // namespace optree
