// SPDX-License-Identifier: Apache-2.0
// The Python class PyTreeSpec.
#pragma once

#include "support/ref.h"

namespace optree {

Ref make_spec_type();

}  // namespace optree
