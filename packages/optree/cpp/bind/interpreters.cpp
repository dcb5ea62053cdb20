// SPDX-License-Identifier: Apache-2.0
#include "bind/interpreters.h"

#include <atomic>
#include <mutex>

#include "support/compat.h"

namespace optree {
namespace {

// Guards the two below. No Python code runs while it is held.
std::mutex mutex;
std::set<std::int64_t> alive;
std::size_t seen = 0;

}  // namespace

std::int64_t current_interpreter() { return PyInterpreterState_GetID(PyInterpreterState_Get()); }
std::int64_t main_interpreter() { return PyInterpreterState_GetID(PyInterpreterState_Main()); }

void interpreter_enters(std::int64_t id) {
    const std::lock_guard<std::mutex> lock(mutex);
    alive.insert(id);
    ++seen;
}

void interpreter_leaves(std::int64_t id) {
    const std::lock_guard<std::mutex> lock(mutex);
    alive.erase(id);
}

std::size_t interpreters_seen() {
    const std::lock_guard<std::mutex> lock(mutex);
    return seen;
}

std::set<std::int64_t> alive_interpreters() {
    const std::lock_guard<std::mutex> lock(mutex);
    return alive;
}

}  // namespace optree
