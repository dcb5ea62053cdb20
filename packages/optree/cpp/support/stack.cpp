// SPDX-License-Identifier: Apache-2.0
#include "support/stack.h"

#include <cstdint>

#include "support/errors.h"

#if defined(_WIN32)
#include <windows.h>
#elif defined(__linux__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace optree {
namespace {

// Stacks grow downwards on every platform supported here.
struct Bounds {
    const char* low = nullptr;  // null: unknown
    const char* high = nullptr;
};

Bounds ask_for_bounds() noexcept {
    Bounds bounds;
#if defined(_WIN32)
    ULONG_PTR low = 0;
    ULONG_PTR high = 0;
    GetCurrentThreadStackLimits(&low, &high);
    bounds = {reinterpret_cast<const char*>(low), reinterpret_cast<const char*>(high)};
#elif defined(__linux__)
    pthread_attr_t attributes;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) return bounds;
    void* low = nullptr;
    std::size_t size = 0;
    std::size_t guard = 0;
    if (pthread_attr_getstack(&attributes, &low, &size) == 0 &&
        pthread_attr_getguardsize(&attributes, &guard) == 0) {
        const char* start = static_cast<const char*>(low);
        bounds = {start + guard, start + size};  // the size may include a guard page
    }
    pthread_attr_destroy(&attributes);
#elif defined(__APPLE__)
    const auto* high = static_cast<const char*>(pthread_get_stackaddr_np(pthread_self()));
    bounds = {high - pthread_get_stacksize_np(pthread_self()), high};
#endif
    return bounds;
}

}  // namespace

std::size_t stack_left() noexcept {
    thread_local const Bounds bounds = ask_for_bounds();
    const char* here = frame_address();
    if (here < bounds.low || here >= bounds.high) return SIZE_MAX;
    return static_cast<std::size_t>(here - bounds.low);
}

OPTREE_NOINLINE void check_stack() {
    if (OPTREE_UNLIKELY(stack_left() < compat::kStackOfPython)) {
        raise(PyExc_RecursionError,
              "Maximum recursion depth exceeded: objects are nested too deeply.");
    }
}

}  // namespace optree
