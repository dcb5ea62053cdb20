// SPDX-License-Identifier: Apache-2.0
// Plain tuples.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct Tuple : AnyNode {
    static constexpr const char* kName = "tuple";
    static constexpr bool kStacksChildren = false;
    static constexpr bool kRebuildsQuietly = true;
    static Ref find_class() { return Ref::borrow(type_object(&PyTuple_Type)); }
    static bool is_empty(const State&, PyObject* object) noexcept {
        return PyTuple_GET_SIZE(object) == 0;
    }
    template <class Visitor>
    OPTREE_INLINE static std::uint32_t visit(Context&, PyObject* object, Visitor& visitor, Ref*) {
        return visit_tuple_items(object, visitor);
    }
    static PyObject* rebuild(State&, const Slot*, PyObject** children, std::size_t count) {
        return steal_into_tuple(children, count);
    }
    static void match(Context&, const Slot*, std::uint32_t arity, PyObject* object,
                      ObjectStack& children) {
        if (!PyTuple_CheckExact(object)) raise_expected("tuple", object);
        if (PyTuple_GET_SIZE(object) != arity) {
            raise_arity("tuple", "tuple", arity, PyTuple_GET_SIZE(object), object);
        }
        Collect collect(children);
        visit_tuple_items(object, collect);
    }
    static std::string text(const Slot*, const Texts& children) {
        return "(" + joined(children) + (children.size() == 1 ? ",)" : ")");
    }
};

}  // namespace optree
