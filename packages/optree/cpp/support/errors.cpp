// SPDX-License-Identifier: Apache-2.0
#include "support/errors.h"

#include <cstdarg>
#include <new>
#include <stdexcept>

namespace optree {

void raise(PyObject* type, const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    PyErr_FormatV(type, format, args);
    va_end(args);
    throw PythonError{};
}

void set_from_current_exception(PyObject* internal_error) {
    try {
        throw;
    } catch (const PythonError&) {
        if (!PyErr_Occurred()) {
            PyErr_SetString(internal_error, "an error was signalled without an exception set");
        }
    } catch (const std::bad_alloc&) {
        PyErr_NoMemory();
    } catch (const std::length_error& error) {
        PyErr_SetString(PyExc_OverflowError, error.what());
    } catch (const std::exception& error) {
        PyErr_Format(internal_error, "%s\n\nPlease file a bug report.", error.what());
    } catch (...) {
        PyErr_SetString(internal_error, "unknown C++ exception");
    }
}

}  // namespace optree
