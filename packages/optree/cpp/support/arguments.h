// SPDX-License-Identifier: Apache-2.0
// Arguments of METH_FASTCALL | METH_KEYWORDS functions.
#pragma once

#include <initializer_list>

#include "support/errors.h"

namespace optree {

// A METH_FASTCALL function in the form that PyMethodDef expects.
template <class Function>
PyCFunction as_cfunction(Function* function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
inline constexpr int kKeywords = METH_FASTCALL | METH_KEYWORDS;

// The parameters of a function in order: positional-only, then positional or keyword, then
// keyword-only.
struct Signature {
    const char* function;
    int positional_only;
    int positional;  // positional-only ones included
    int required;    // the first ones, which must be passed
    std::initializer_list<const char*> names;
};

// Stores the arguments in `out` (one for each name; null if not passed) or raises TypeError.
void parse_arguments(const Signature& signature, PyObject* const* args, Py_ssize_t nargs,
                     PyObject* kwnames, PyObject** out);

// A callable, or null for None.
PyObject* checked_predicate(PyObject* value, const char* name);
OPTREE_INLINE PyObject* as_predicate(PyObject* value, const char* name) {
    return value == nullptr || value == Py_None ? nullptr : checked_predicate(value, name);
}
// The truth of a value. Raises for a str; None is false.
bool checked_bool(PyObject* value, const char* name);
OPTREE_INLINE bool as_bool(PyObject* value, const char* name) {
    if (value == nullptr || value == Py_False) return false;
    return value == Py_True || checked_bool(value, name);
}
// An exact str equal to the given str. If the value is null, returns `missing` (an exact str).
Ref checked_exact_str(PyObject* value, const char* name);
OPTREE_INLINE Ref exact_str(PyObject* value, PyObject* missing, const char* name) {
    if (value == nullptr || value == missing) return Ref::borrow(missing);
    return checked_exact_str(value, name);
}

}  // namespace optree
