// SPDX-License-Identifier: Apache-2.0
// Apply a rule to many tensors on the CPU: one parallel region a step.
#pragma once

#include "launch/tensors.h"
#include "math/adam.h"
#include "math/rule.h"
#include "math/sgd.h"

namespace torchopt {

/// Elements in one unit of work. Below it a step runs on the calling thread: waking a thread costs more.
inline constexpr std::int64_t kChunk = 16384;

/// Runs `Rule` over all tensors with at most `num_threads` threads. The result does not depend on the number of threads
/// or on the instruction set. Instantiated for the rules listed at the end of openmp.cpp.
template <class Rule>
void run_on_cpu(const Tensors& tensors, const typename Rule::Hyper& hyper, int num_threads);

}  // namespace torchopt
