// SPDX-License-Identifier: Apache-2.0
// collections.deque; the slot is its maxlen, null for None.
#pragma once

#include "nodes/list.h"

namespace optree {

struct Deque {
    static constexpr const char* kName = "deque";
    static std::uint32_t expand(Context& context, PyObject* object, ObjectStack& children,
                                Payload& payload) {
        Ref maxlen = checked(PyObject_GetAttr(object, context.state.str_maxlen.get()));
        if (maxlen.get() != Py_None) payload.slot[0] = std::move(maxlen);
        const Ref items = checked(PySequence_List(object));
        Payload none;
        return List::expand(context, items.get(), children, none);
    }
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children,
                             std::size_t count) {
        PyObject* items = steal_into_list(children, count);
        if (items == nullptr) return nullptr;
        PyObject* args[] = {nullptr, items, as_object(slots[0])};
        PyObject* deque = PyObject_Vectorcall(
            state.deque_type.get(), args + 1,
            (slots[0] != nullptr ? 2 : 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
        Py_DECREF(items);
        return deque;
    }
    static void match(Context& context, const Slot*, std::uint32_t arity, PyObject* object,
                      ObjectStack& children) {
        if (type_object(Py_TYPE(object)) != context.state.deque_type.get()) {
            raise_expected("collections.deque", object);
        }
        const Ref items = checked(PySequence_List(object));
        if (PyList_GET_SIZE(items.get()) != arity) {
            raise_arity("deque", "deque", arity, PyList_GET_SIZE(items.get()), object);
        }
        Payload none;
        List::expand(context, items.get(), children, none);
    }
    static Ref entry(const Slot*, std::uint32_t index) { return index_entry(index); }
    static PyObject* type(State& state, const Slot*) noexcept { return state.deque_type.get(); }
    static Ref data(const Slot* slots) {
        return Ref::borrow(slots[0] != nullptr ? as_object(slots[0]) : Py_None);
    }
};

}  // namespace optree
