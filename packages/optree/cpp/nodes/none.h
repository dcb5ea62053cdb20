// SPDX-License-Identifier: Apache-2.0
// None as a node without children.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct None : AnyNode {
    static constexpr const char* kName = "NoneType";
    static constexpr bool kStacksChildren = false;
    static constexpr bool kRebuildsQuietly = true;
    static Ref find_class() { return Ref::borrow(type_object(Py_TYPE(Py_None))); }
    static bool is_empty(const State&, PyObject*) noexcept { return true; }
    template <class Visitor>
    OPTREE_INLINE static std::uint32_t visit(Context&, PyObject*, Visitor&, Ref*) {
        return 0;
    }
    static PyObject* rebuild(State&, const Slot*, PyObject**, std::size_t) {
        return compat::new_ref(Py_None);
    }
    static void match(Context&, const Slot*, std::uint32_t, PyObject* object, ObjectStack&) {
        if (object != Py_None) raise(PyExc_ValueError, "Expected None, got %R.", object);
    }
    static std::string text(const Slot*, const Texts&) { return "None"; }
    static void verify(const ReadNode& node, const Ref*) {
        if (node.arity != 0) malformed("a None node has children");
        if (node.none_is_leaf) malformed("a None node stands where None is a leaf");
    }
};

}  // namespace optree
