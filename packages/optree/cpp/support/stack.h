// SPDX-License-Identifier: Apache-2.0
// The C stack of this thread.
#pragma once

#include <cstddef>

#include "cpython/compat.h"

namespace optree {

// An address in the frame of the caller.
OPTREE_INLINE const char* frame_address() noexcept {
#if defined(__GNUC__) || defined(__clang__)
    return static_cast<const char*>(__builtin_frame_address(0));
#else
    volatile char here = 0;
    return const_cast<const char*>(&here);
#endif
}

// How many bytes the stack can still grow by; SIZE_MAX where this is unknown: on platforms without
// the information, and on a stack that is not the thread's own (fibers).
std::size_t stack_left() noexcept;

// Raises RecursionError where the stack has no room for Python code: what specs hold may be specs, and
// so on, deeper than CPython's own limits are for frames of ours.
void check_stack();

}  // namespace optree
