// SPDX-License-Identifier: Apache-2.0
// What a process may rely on after fork(): the child has one thread, and the memory as the others left it.
#pragma once

#include <cstdint>

namespace torchopt::forks {

/// Called once, when the module is loaded. From then on no thread holds a lock of ours while the process forks.
void watch();

/// A number that no ancestor of this process had: what another thread was about to do in one of them is never done.
std::uint64_t generation() noexcept;

/// How many of `wanted` threads a launch may use. 1 in a child whose parent had started the team of OpenMP: its threads
/// are not in the child, and GNU's OpenMP waits for them forever.
int usable_threads(int wanted) noexcept;

}  // namespace torchopt::forks
