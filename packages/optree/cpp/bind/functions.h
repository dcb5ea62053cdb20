// SPDX-License-Identifier: Apache-2.0
// The functions of the extension module, as builtins whose `self` is the state.
#pragma once

#include "cpython/compat.h"

namespace optree {

// Each table ends with a null entry.
extern PyMethodDef tree_functions[];      // flatten, map, ...: called all the time
extern PyMethodDef registry_functions[];  // register_node, is_namedtuple, ...: called now and then

}  // namespace optree
