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

#if OPTREE_THREADS_UNWIND
[[noreturn]] OPTREE_COLD inline void suspend_thread() noexcept {
    for (;;) pause();
}
#endif

// Runs `call`. Before 3.14, CPython ends a daemon thread that asks for the interpreter lock after
// finalization by unwinding its stack. Our destructors would then drop references without the lock.
// This function suspends such a thread instead, as later versions of CPython do.
template <class Call>
OPTREE_INLINE auto calling_python(Call&& call) {
#if OPTREE_THREADS_UNWIND
    try {
        return call();
    } catch (abi::__forced_unwind&) {
        suspend_thread();
    }
#else
    return call();
#endif
}

// Drops a reference. Destroying the object may run Python code.
#if OPTREE_THREADS_UNWIND && !defined(Py_GIL_DISABLED) && !defined(Py_REF_DEBUG)
OPTREE_NOINLINE inline void destroy_object(PyObject* object) noexcept {
    calling_python([&] { _Py_Dealloc(object); });
}
// What Py_DECREF does. A handler in each caller took up to a tenth more instructions of flatten
// (benchmarks/optree/instructions.py).
OPTREE_INLINE void drop(PyObject* object) noexcept {
#if PY_VERSION_HEX >= 0x030C0000
    if (_Py_IsImmortal(object)) return;
#endif
    if (--object->ob_refcnt == 0) destroy_object(object);
}
#else
OPTREE_INLINE void drop(PyObject* object) noexcept {
    calling_python([&] { Py_DECREF(object); });
}
#endif
OPTREE_INLINE void xdrop(PyObject* object) noexcept {
    if (object != nullptr) drop(object);
}

}  // namespace optree
