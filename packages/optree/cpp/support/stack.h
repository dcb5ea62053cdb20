// SPDX-License-Identifier: Apache-2.0
// The C stack of the current thread.
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

// The number of bytes by which the stack can still grow. SIZE_MAX if this is unknown: on platforms
// without the information, and on a stack that is not the thread's own (fibers).
std::size_t stack_left() noexcept;

// Raises RecursionError if the stack has no room for Python code. Specs can be nested in specs more
// deeply than CPython's own limits allow for our frames.
void check_stack();

}  // namespace optree
