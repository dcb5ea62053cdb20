// SPDX-License-Identifier: Apache-2.0
// Apply a rule to many tensors on a CUDA device. No CUDA header is needed to call it.
#pragma once

#include "launch/tensors.h"

namespace torchopt {

/// Elements one block handles.
inline constexpr std::int64_t kCudaBlockElements = 2048;

/// Enqueues the kernel `launch.kind` of `Rule` over all tensors on the launch's stream and device; does not wait.
/// Steps given by address are read on the device, so nothing is synchronised. Throws std::runtime_error with CUDA's
/// message when a launch is refused. Instantiated for the rules of math/rules.h.
template <class Rule>
void run_on_cuda(const CudaLaunch& launch);

}  // namespace torchopt
