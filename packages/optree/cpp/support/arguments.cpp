// SPDX-License-Identifier: Apache-2.0
#include "support/arguments.h"

#include <algorithm>

namespace optree {

void parse_arguments(const Signature& signature, PyObject* const* args, Py_ssize_t nargs,
                     PyObject* kwnames, PyObject** out) {
    const auto total = static_cast<int>(signature.names.size());
    if (OPTREE_LIKELY(kwnames == nullptr && nargs == total && nargs <= signature.positional)) {
        std::copy(args, args + nargs, out);
        return;
    }
    if (nargs > signature.positional) {
        raise(PyExc_TypeError, "%s() takes at most %d positional argument%s but %zd were given",
              signature.function, signature.positional, signature.positional == 1 ? "" : "s",
              nargs);
    }
    std::copy(args, args + nargs, out);
    std::fill(out + nargs, out + total, nullptr);
    if (kwnames != nullptr) {
        for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(kwnames); ++k) {
            PyObject* name = PyTuple_GET_ITEM(kwnames, k);
            int index = signature.positional_only;
            while (index < total &&
                   PyUnicode_CompareWithASCIIString(name, signature.names.begin()[index]) != 0) {
                ++index;
            }
            if (index == total) {
                raise(PyExc_TypeError, "%s() got an unexpected keyword argument '%U'",
                      signature.function, name);
            }
            if (out[index] != nullptr) {
                raise(PyExc_TypeError, "%s() got multiple values for argument '%U'",
                      signature.function, name);
            }
            out[index] = args[nargs + k];
        }
    }
    for (int i = 0; i < signature.required; ++i) {
        if (out[i] == nullptr) {
            raise(PyExc_TypeError, "%s() missing required argument '%s' (position %d)",
                  signature.function, signature.names.begin()[i], i + 1);
        }
    }
}

PyObject* checked_predicate(PyObject* value, const char* name) {
    if (PyCallable_Check(value) == 0) {
        raise(PyExc_TypeError, "expected a callable or None for '%s', got %R", name, value);
    }
    return value;
}

bool checked_bool(PyObject* value, const char* name) {
    if (value == Py_None) return false;
    const PyNumberMethods* number = Py_TYPE(value)->tp_as_number;
    if (number == nullptr || number->nb_bool == nullptr) {
        raise(PyExc_TypeError, "expected a bool for '%s', got %R", name, value);
    }
    return truth_of(value);
}

Ref checked_exact_str(PyObject* value, const char* name) {
    if (!PyUnicode_Check(value)) {
        raise(PyExc_TypeError, "expected a str for '%s', got %R", name, value);
    }
    return checked(PyUnicode_FromObject(value));
}

}  // namespace optree
