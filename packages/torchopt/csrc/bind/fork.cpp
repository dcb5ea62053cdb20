// SPDX-License-Identifier: Apache-2.0
#include "bind/fork.h"

#include <atomic>
#include <mutex>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "bind/buffers.h"

namespace torchopt::forks {
namespace {

std::atomic<std::uint64_t> current{1};
std::atomic<bool> has_team{false};   // a launch of this process used several threads
std::atomic<bool> lost_team{false};  // a launch of an ancestor did

#if !defined(_WIN32)
void before() { buffers::lock(); }
void in_parent() { buffers::unlock(); }
void in_child() {
    buffers::unlock();
    current.fetch_add(1);
    if (has_team.load()) lost_team.store(true);
}
#endif

}  // namespace

void watch() {
#if !defined(_WIN32)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(&before, &in_parent, &in_child); });
#endif
}

std::uint64_t generation() noexcept { return current.load(std::memory_order_relaxed); }

int usable_threads(int wanted) noexcept {
    if (wanted <= 1) return wanted;
    if (lost_team.load(std::memory_order_relaxed)) return 1;
    has_team.store(true, std::memory_order_relaxed);
    return wanted;
}

}  // namespace torchopt::forks
