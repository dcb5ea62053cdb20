// SPDX-License-Identifier: Apache-2.0
// collections.deque. The slot is its maxlen.
#pragma once

#include "nodes/list.h"

namespace optree {

struct Deque : AnyNode {
    static constexpr const char* kName = "deque";
    static Ref find_class() { return attribute_of_module("collections", "deque"); }
    template <class Visitor>
    static std::uint32_t visit(Context& context, PyObject* object, Visitor& visitor, Ref* slots) {
        Ref maxlen = attribute_of(object, context.state.str_maxlen.get());
        if (maxlen.get() != Py_None) slots[0] = std::move(maxlen);
        return collect_items(context, checked(PySequence_List(object)), visitor.stack());
    }
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children,
                             std::size_t count) {
        PyObject* items = steal_into_list(children, count);
        if (items == nullptr) return nullptr;
        PyObject* args[] = {nullptr, items, as_object(slots[0])};
        PyObject* deque = PyObject_Vectorcall(
            state.class_of<Deque>(), args + 1,
            (slots[0] != nullptr ? 2 : 1) | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
        drop(items);
        return deque;
    }
    static void match(Context& context, const Slot*, std::uint32_t arity, PyObject* object,
                      ObjectStack& children) {
        if (type_object(Py_TYPE(object)) != context.state.class_of<Deque>()) {
            raise_expected("collections.deque", object);
        }
        Ref items = checked(PySequence_List(object));
        if (PyList_GET_SIZE(items.get()) != arity) {
            raise_arity("deque", "deque", arity, PyList_GET_SIZE(items.get()), object);
        }
        collect_items(context, std::move(items), children);
    }
    static std::string text(const Slot* slots, const Texts& children) {
        std::string text = "deque(";
        if (!children.empty()) text += "[" + joined(children) + "]";
        if (slots[0] != nullptr) {
            if (!children.empty()) text += ", ";
            text += "maxlen=" + repr_of(as_object(slots[0]));
        }
        return text + ")";
    }

  private:
    static std::uint32_t collect_items(Context& context, const Ref& items, ObjectStack& children) {
        Collect collect(children);
        return List::visit(context, items.get(), collect, nullptr);
    }
};

}  // namespace optree
