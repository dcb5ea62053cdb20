// SPDX-License-Identifier: Apache-2.0
// Named tuples; the slot is the class.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct NamedTuple {
    static constexpr const char* kName = "namedtuple";
    static std::uint32_t expand(Context&, PyObject* object, ObjectStack& children,
                                Payload& payload) {
        payload.slot[0] = Ref::borrow(type_object(Py_TYPE(object)));
        return push_tuple_items(object, children);
    }
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children,
                             std::size_t count);
    static void match(Context& context, const Slot* slots, std::uint32_t arity, PyObject* object,
                      ObjectStack& children) {
        PyTypeObject* type = Py_TYPE(object);
        Ref alive;
        if (type_object(type) != as_object(slots[0])) {
            alive = Ref::borrow(type_object(type));  // the question may run Python code
            if (!PyTuple_Check(object) || !context.state.namedtuples.contains(type)) {
                raise_expected("collections.namedtuple", object);
            }
        }
        if (PyTuple_GET_SIZE(object) != arity) {
            raise_arity("namedtuple", "tuple", arity, PyTuple_GET_SIZE(object), object);
        }
        if (type_object(type) != as_object(slots[0])) {
            raise(PyExc_ValueError,
                  "namedtuple type mismatch; expected type: %R, got type: %R; tuple: %R.",
                  as_object(slots[0]), type, object);
        }
        push_tuple_items(object, children);
    }
    static Ref entry(const Slot*, std::uint32_t index) { return index_entry(index); }
    static PyObject* type(State&, const Slot* slots) noexcept { return as_object(slots[0]); }
    static Ref data(const Slot* slots) { return Ref::borrow(as_object(slots[0])); }
};

}  // namespace optree
