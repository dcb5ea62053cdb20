// SPDX-License-Identifier: Apache-2.0
// C's PyStructSequence, visible fields only; the slot is the class.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct StructSeq {
    static constexpr const char* kName = "PyStructSequence";
    static std::uint32_t expand(Context&, PyObject* object, ObjectStack& children,
                                Payload& payload) {
        payload.slot[0] = Ref::borrow(type_object(Py_TYPE(object)));
        return push_tuple_items(object, children);
    }
    static PyObject* rebuild(State&, const Slot* slots, PyObject** children, std::size_t count) {
        PyObject* items = steal_into_tuple(children, count);
        if (items == nullptr) return nullptr;
        PyObject* made = PyObject_CallOneArg(as_object(slots[0]), items);
        Py_DECREF(items);
        return made;
    }
    static void match(Context& context, const Slot* slots, std::uint32_t arity, PyObject* object,
                      ObjectStack& children) {
        PyTypeObject* type = Py_TYPE(object);
        Ref alive;
        if (type_object(type) != as_object(slots[0])) {
            alive = Ref::borrow(type_object(type));  // the question may run Python code
            if (!PyTuple_Check(object) || !context.state.structseqs.contains(type)) {
                raise_expected("PyStructSequence type", object);
            }
        }
        if (PyTuple_GET_SIZE(object) != arity) {
            raise_arity("PyStructSequence", "tuple", arity, PyTuple_GET_SIZE(object), object);
        }
        if (type_object(type) != as_object(slots[0])) {
            raise(PyExc_ValueError,
                  "PyStructSequence type mismatch; expected type: %R, got type: %R; tuple: %R.",
                  as_object(slots[0]), type, object);
        }
        push_tuple_items(object, children);
    }
    static Ref entry(const Slot*, std::uint32_t index) { return index_entry(index); }
    static PyObject* type(State&, const Slot* slots) noexcept { return as_object(slots[0]); }
    static Ref data(const Slot* slots) { return Ref::borrow(as_object(slots[0])); }
};

}  // namespace optree
