// SPDX-License-Identifier: Apache-2.0
// Apply a rule to many tensors on a CUDA device. No CUDA header is needed to call it.
#pragma once

#include <cstdint>

#include "launch/tensors.h"
#include "math/adam.h"
#include "math/rule.h"
#include "math/sgd.h"

namespace torchopt {

/// Enqueues `Rule` over all tensors on `stream` (a cudaStream_t as an integer) of `device`; does not wait.
/// The steps are read on the device, so nothing is synchronised. Throws std::runtime_error with CUDA's message when a
/// launch is refused. Instantiated for the rules listed at the end of cuda.cu.
template <class Rule>
void run_on_cuda(const Tensors& tensors, const typename Rule::Hyper& hyper, int device,
                 std::uintptr_t stream);

}  // namespace torchopt
