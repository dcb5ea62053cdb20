// SPDX-License-Identifier: Apache-2.0
// What a process can rely on after fork(): the child has one thread, and memory is as the other threads left it.
#pragma once

#include <cstdint>

namespace torchopt::forks {

/// Called once, when the module is loaded. Afterwards no thread holds one of our locks while the process forks.
void watch();

/// A number that differs from that of every ancestor. Work that another thread began in an ancestor never completes
/// here.
std::uint64_t generation() noexcept;

/// The number of threads, at most `wanted`, that a launch may use. This is 1 in a child whose parent had started the
/// OpenMP team: the team's threads do not exist in the child, and GNU's OpenMP would wait for them forever.
int usable_threads(int wanted) noexcept;

}  // namespace torchopt::forks
