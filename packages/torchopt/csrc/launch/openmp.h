// SPDX-License-Identifier: Apache-2.0
// Apply a rule to many tensors on the CPU: one parallel region a step.
#pragma once

#include "launch/tensors.h"

namespace torchopt {

/// Elements in one unit of work. Below it a step runs on the calling thread: waking a thread costs more.
inline constexpr std::int64_t kChunk = 16384;

/// Runs the kernel `launch.kind` of `Rule` over all tensors with at most `launch.num_threads` threads. The result does
/// not depend on the number of threads or on the instruction set. Throws before anything is written.
/// Instantiated for the rules of math/rules.h.
template <class Rule>
void run_on_cpu(const CpuLaunch& launch);

}  // namespace torchopt
