// SPDX-License-Identifier: Apache-2.0
// Calls into Python code that may never return.
#pragma once

#include "cpython/compat.h"

#if defined(__GLIBCXX__) && PY_VERSION_HEX < 0x030E0000
#include <cxxabi.h>
#include <unistd.h>
#define OPTREE_THREADS_UNWIND 1
#else
#define OPTREE_THREADS_UNWIND 0
#endif

namespace optree {

// Runs `call`. Before 3.14, CPython ends a daemon thread that asks for the interpreter lock after
// finalization by unwinding its stack. Our destructors would then drop references without the lock.
// This function suspends such a thread instead, as later versions of CPython do.
template <class Call>
OPTREE_INLINE auto calling_python(Call&& call) {
#if OPTREE_THREADS_UNWIND
    try {
        return call();
    } catch (abi::__forced_unwind&) {
        for (;;) pause();
    }
#else
    return call();
#endif
}

}  // namespace optree
