// SPDX-License-Identifier: Apache-2.0
// Applies a rule to many tensors on the CPU with one parallel region for each step.
#pragma once

#include "launch/tensors.h"

namespace torchopt {

/// The number of elements in one unit of work. A smaller step runs on the calling thread, since waking another costs
/// more.
inline constexpr std::int64_t kChunk = 16384;

/// Runs the kernel `launch.kind` of `Rule` over all tensors with at most `launch.num_threads` threads. The result does
/// not depend on the number of threads or on the instruction set. Errors are thrown before anything is written.
/// Instantiated for the rules of math/rules.h.
template <class Rule>
void run_on_cpu(const CpuLaunch& launch);

}  // namespace torchopt
