// SPDX-License-Identifier: Apache-2.0
#include "cpython/tuple_items.h"

namespace optree {

// Whether an instance created and filled here equals one that Python creates, hash included.
bool try_tuple_items() {
    const Owned expected = must(Py_BuildValue("(iii)", 1001, 1002, 1003));
    const Owned made = must(new_plain_tuple(&PyTuple_Type, tuple_items(expected.get()), 3));
    for (Py_ssize_t i = 0; i < 3; ++i) Py_INCREF(PyTuple_GET_ITEM(expected.get(), i));
    return PyTuple_GET_SIZE(made.get()) == 3 &&
           PyObject_Hash(made.get()) == PyObject_Hash(expected.get()) &&
           PyObject_RichCompareBool(made.get(), expected.get(), Py_EQ) == 1;
}

}  // namespace optree
