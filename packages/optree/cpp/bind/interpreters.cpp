// SPDX-License-Identifier: Apache-2.0
#include "bind/interpreters.h"

#include <atomic>
#include <thread>

#include "cpython/compat.h"

namespace optree {
namespace {

// Interpreters with their own locks share this data, so it needs a lock too. It is held for a few
// instructions and never while Python code runs. A std::mutex would crash on Windows when an older
// C++ runtime was loaded first.
std::atomic_flag busy = ATOMIC_FLAG_INIT;
class Guard {
  public:
    Guard() noexcept {
        while (busy.test_and_set(std::memory_order_acquire)) std::this_thread::yield();
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    ~Guard() { busy.clear(std::memory_order_release); }
};

// The data that the lock protects.
std::set<std::int64_t> alive;
std::size_t seen = 0;

}  // namespace

std::int64_t current_interpreter() { return PyInterpreterState_GetID(PyInterpreterState_Get()); }
std::int64_t main_interpreter() { return PyInterpreterState_GetID(PyInterpreterState_Main()); }

void interpreter_enters(std::int64_t id) {
    const Guard guard;
    alive.insert(id);
    ++seen;
}

void interpreter_leaves(std::int64_t id) {
    const Guard guard;
    alive.erase(id);
}

std::size_t interpreters_seen() {
    const Guard guard;
    return seen;
}

std::set<std::int64_t> alive_interpreters() {
    const Guard guard;
    return alive;
}

}  // namespace optree
