// SPDX-License-Identifier: Apache-2.0
// Applies a rule to many tensors on a CUDA device. Callers need no CUDA header.
#pragma once

#include "launch/tensors.h"

namespace torchopt {

/// The number of elements that one block handles.
inline constexpr std::int64_t kCudaBlockElements = 2048;

/// Enqueues the kernel `launch.kind` of `Rule` over all tensors on the launch's stream and device and does not wait.
/// Steps given by address are read on the device, so nothing is synchronised. Throws std::runtime_error with CUDA's
/// message if a launch fails. Instantiated for the rules of math/rules.h.
template <class Rule>
void run_on_cuda(const CudaLaunch& launch);

}  // namespace torchopt
