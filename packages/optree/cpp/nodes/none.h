// SPDX-License-Identifier: Apache-2.0
// None as a node without children.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct None {
    static constexpr const char* kName = "NoneType";
    static std::uint32_t expand(Context&, PyObject*, ObjectStack&, Payload&) { return 0; }
    static PyObject* rebuild(State&, const Slot*, PyObject**, std::size_t) {
        return compat::new_ref(Py_None);
    }
    static void match(Context&, const Slot*, std::uint32_t, PyObject* object, ObjectStack&) {
        if (object != Py_None) raise(PyExc_ValueError, "Expected None, got %R.", object);
    }
    static Ref entry(const Slot*, std::uint32_t index) { return index_entry(index); }
    static PyObject* type(State&, const Slot*) noexcept { return type_object(Py_TYPE(Py_None)); }
    static Ref data(const Slot*) { return nullptr; }
};

}  // namespace optree
