// SPDX-License-Identifier: Apache-2.0
#include "cpython/type_slots.h"

namespace optree {

// Whether the version of a class changes when the class or a base changes, and only then.
bool try_type_slots() {
    const Owned base =
        must(PyObject_CallFunction(reinterpret_cast<PyObject*>(&PyType_Type), "s(){}", "Base"));
    const Owned cls = must(PyObject_CallFunction(reinterpret_cast<PyObject*>(&PyType_Type),
                                                 "s(O){}", "Class", base.get()));
    auto* type = reinterpret_cast<PyTypeObject*>(cls.get());
    const auto version = [&] {
        must(PyObject_GetAttrString(cls.get(), "__name__"));  // assigns a version
        must(PyObject_GetAttrString(cls.get(), "__init__"));
        return compat::type_version(type);
    };
    const unsigned int first = version();
    if (first == 0 || first != version()) return false;
    must_do(PyObject_SetAttrString(cls.get(), "attribute", Py_None));
    const unsigned int second = version();
    must_do(PyObject_SetAttrString(base.get(), "__init__", Py_None));
    const unsigned int third = version();
    return second != 0 && third != 0 && first != second && second != third && first != third;
}

}  // namespace optree
