// SPDX-License-Identifier: Apache-2.0
// Raising Python exceptions from C++, and turning C++ exceptions into Python ones at the boundary.
#pragma once

#include <exception>
#if defined(__GLIBCXX__)
#include <cxxabi.h>
// A thread that is ended while it runs Python code (a daemon thread at exit) unwinds through our
// frames; that unwinding must be let through.
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

// Adds a note, formatted like PyUnicode_FromFormat, to the exception that is set (Python 3.11+):
// the published message itself does not change.
OPTREE_COLD void add_note(const char* format, ...);

// Sets the Python exception for the C++ exception in flight; `internal_error` names our own bugs.
OPTREE_COLD void set_from_current_exception(PyObject* internal_error);

// Runs `body`, which returns a new reference, and turns what it throws into a Python exception.
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
