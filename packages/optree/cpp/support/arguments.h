// SPDX-License-Identifier: Apache-2.0
// Arguments of METH_FASTCALL | METH_KEYWORDS functions.
#pragma once

#include <initializer_list>

#include "support/errors.h"

namespace optree {

// A METH_FASTCALL function as PyMethodDef wants it.
template <class Function>
PyCFunction as_cfunction(Function* function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}
inline constexpr int kKeywords = METH_FASTCALL | METH_KEYWORDS;

// The parameters of a function, in order: positional only, then positional or keyword, then keyword
// only.
struct Signature {
    const char* function;
    int positional_only;
    int positional;  // positional-only ones included
    int required;    // how many of the first must be given
    std::initializer_list<const char*> names;
};

// Puts the arguments into `out` (one per name; null where not given) or raises TypeError.
void parse_arguments(const Signature& signature, PyObject* const* args, Py_ssize_t nargs,
                     PyObject* kwnames, PyObject** out);

// A callable or None (null).
PyObject* checked_predicate(PyObject* value, const char* name);
OPTREE_INLINE PyObject* as_predicate(PyObject* value, const char* name) {
    return value == nullptr || value == Py_None ? nullptr : checked_predicate(value, name);
}
// A truth value; a str is refused, None is false.
bool checked_bool(PyObject* value, const char* name);
OPTREE_INLINE bool as_bool(PyObject* value, const char* name) {
    if (value == nullptr || value == Py_False) return false;
    return value == Py_True || checked_bool(value, name);
}
// An exact str with the value of a str; `missing` (an exact str) stands for null.
Ref checked_exact_str(PyObject* value, const char* name);
OPTREE_INLINE Ref exact_str(PyObject* value, PyObject* missing, const char* name) {
    if (value == nullptr || value == missing) return Ref::borrow(missing);
    return checked_exact_str(value, name);
}

}  // namespace optree
