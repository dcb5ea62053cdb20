// SPDX-License-Identifier: Apache-2.0
#include "cpython/list_items.h"

namespace optree {

// Whether a list with items set by `give_items` can be read, grow and shrink.
bool try_list_items() {
    constexpr Py_ssize_t kCount = 3;
    const Owned expected = must(Py_BuildValue("[iii]", 1001, 1002, 1003));
    auto** items = static_cast<PyObject**>(PyMem_Malloc(kCount * sizeof(PyObject*)));
    if (items == nullptr) return false;
    const Owned made = must(PyList_New(0));
    for (Py_ssize_t i = 0; i < kCount; ++i) {
        items[i] = compat::new_ref(PyList_GET_ITEM(expected.get(), i));
    }
    give_items(made.get(), items, kCount);
    if (PyList_GET_SIZE(made.get()) != kCount) {
        PyMem_Free(items);
        return false;
    }
    if (PyObject_RichCompareBool(made.get(), expected.get(), Py_EQ) != 1) return false;
    for (int i = 0; i < 100; ++i) must_do(PyList_Append(made.get(), Py_None));
    must_do(PyList_SetSlice(made.get(), kCount, PY_SSIZE_T_MAX, nullptr));
    return PyObject_RichCompareBool(made.get(), expected.get(), Py_EQ) == 1;
}

}  // namespace optree
