// SPDX-License-Identifier: Apache-2.0
// The built-in frozendict of Python 3.15: traversed like a dict, rebuilt in insertion order.
#pragma once

#include "nodes/dict.h"

namespace optree {

struct FrozenDict : DictKind<FrozenDict> {
    static constexpr const char* kName = "frozendict";
    // Accepts only a static class: a class that a program added to builtins does not have the
    // layout of a dict.
    static Ref find_class() {
        const Ref builtins = checked(PyImport_ImportModule("builtins"));
        Ref cls = Ref::steal(PyObject_GetAttrString(builtins.get(), "frozendict"));
        if (!cls) PyErr_Clear();
        const bool is_builtin =
            cls && PyType_Check(cls.get()) &&
            !PyType_HasFeature(reinterpret_cast<PyTypeObject*>(cls.get()), Py_TPFLAGS_HEAPTYPE);
        return is_builtin ? std::move(cls) : Ref();
    }
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children,
                             std::size_t count) {
        PyObject* dict = Dict::rebuild(state, slots, children, count);
        if (OPTREE_UNLIKELY(dict == nullptr)) return nullptr;
        PyObject* made = PyObject_CallOneArg(state.class_of<FrozenDict>(), dict);
        drop(dict);
        return made;
    }
};

}  // namespace optree
