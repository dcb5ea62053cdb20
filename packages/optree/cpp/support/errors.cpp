// SPDX-License-Identifier: Apache-2.0
#include "support/errors.h"

#include <cstdarg>
#include <new>
#include <stdexcept>

#include "cpython/compat.h"

namespace optree {

void raise(PyObject* type, const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    calling_python([&] { return PyErr_FormatV(type, format, args); });
    va_end(args);
    throw PythonError{};
}

Ref formatted(const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    PyObject* text = calling_python([&] { return PyUnicode_FromFormatV(format, args); });
    va_end(args);
    return checked(text);
}

void add_note(const char* format, ...) {
    if (!compat::kHasNotes) return;
    PyObject* type = nullptr;
    PyObject* value = nullptr;
    PyObject* traceback = nullptr;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    std::va_list args;
    va_start(args, format);
    const Ref note =
        Ref::steal(calling_python([&] { return PyUnicode_FromFormatV(format, args); }));
    va_end(args);
    if (note) {
        Ref::steal(calling_python(
            [&] { return PyObject_CallMethod(value, "add_note", "O", note.get()); }));
    }
    PyErr_Clear();  // keep the original exception
    PyErr_Restore(type, value, traceback);
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
