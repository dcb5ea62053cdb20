// SPDX-License-Identifier: Apache-2.0
// Garbage collection slots of PyTreeSpec.
#pragma once

#include "walk/spec_object.h"

namespace optree {

int spec_traverse(PyObject* self, visitproc visit, void* arg);
int spec_clear(PyObject* self);
void spec_dealloc(PyObject* self);

}  // namespace optree
