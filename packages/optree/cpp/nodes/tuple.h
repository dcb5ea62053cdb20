// SPDX-License-Identifier: Apache-2.0
// Plain tuples.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct Tuple {
    static constexpr const char* kName = "tuple";
    static std::uint32_t expand(Context&, PyObject* object, ObjectStack& children, Payload&) {
        return push_tuple_items(object, children);
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
        push_tuple_items(object, children);
    }
    static Ref entry(const Slot*, std::uint32_t index) { return index_entry(index); }
    static PyObject* type(State&, const Slot*) noexcept { return type_object(&PyTuple_Type); }
    static Ref data(const Slot*) { return nullptr; }
};

}  // namespace optree
