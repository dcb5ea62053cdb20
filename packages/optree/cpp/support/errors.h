// SPDX-License-Identifier: Apache-2.0
// Raises Python exceptions from C++, and translates C++ exceptions into Python ones at the
// boundary.
#pragma once

#include <exception>
#if defined(__GLIBCXX__)
#include <cxxabi.h>
// A thread that ends while it runs Python code (a daemon thread at exit) unwinds through our
// frames. The handlers must let this unwinding pass.
#define OPTREE_RETHROW_THREAD_EXIT  \
    catch (abi::__forced_unwind&) { \
        throw;                      \
    }
#else
#define OPTREE_RETHROW_THREAD_EXIT
#endif

#include "support/ref.h"

namespace optree {

// Sets `type` with a message formatted like PyUnicode_FromFormat and throws PythonError.
[[noreturn]] OPTREE_COLD void raise(PyObject* type, const char* format, ...);

// A str formatted like PyUnicode_FromFormat. May run Python code.
Ref formatted(const char* format, ...);

// Adds a note, formatted like PyUnicode_FromFormat, to the current exception (Python 3.11+). The
// message itself stays that of the published package.
OPTREE_COLD void add_note(const char* format, ...);

// Sets the Python exception for the C++ exception in flight. `internal_error` is the class for bugs
// in this library.
OPTREE_COLD void set_from_current_exception(PyObject* internal_error);

// Runs `body`, which returns a new reference, and translates its C++ exceptions into Python ones.
template <class Body>
OPTREE_INLINE PyObject* guarded(PyObject* internal_error, Body&& body) {
    try {
        return body();
    }
    OPTREE_RETHROW_THREAD_EXIT catch (...) {
        set_from_current_exception(internal_error);
        return nullptr;
    }
}

}  // namespace optree
