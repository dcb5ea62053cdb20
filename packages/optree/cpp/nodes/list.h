// SPDX-License-Identifier: Apache-2.0
// Plain lists.
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct List {
    static constexpr const char* kName = "list";
    static std::uint32_t expand(Context&, PyObject* object, ObjectStack& children, Payload&) {
        const CriticalSection reading(object);
        const auto count = static_cast<std::size_t>(PyList_GET_SIZE(object));
        children.reserve(count);
        for (std::size_t i = 0; i < count; ++i) {
            children.push_unchecked(PyList_GET_ITEM(object, static_cast<Py_ssize_t>(i)));
        }
        return checked_count(count);
    }
    static PyObject* rebuild(State&, const Slot*, PyObject** children, std::size_t count) {
        return steal_into_list(children, count);
    }
    static void match(Context& context, const Slot*, std::uint32_t arity, PyObject* object,
                      ObjectStack& children) {
        if (!PyList_CheckExact(object)) raise_expected("list", object);
        Payload none;
        const std::uint32_t count = expand(context, object, children, none);
        if (count != arity) raise_arity("list", "list", arity, count, object);
    }
    static Ref entry(const Slot*, std::uint32_t index) { return index_entry(index); }
    static PyObject* type(State&, const Slot*) noexcept { return type_object(&PyList_Type); }
    static Ref data(const Slot*) { return nullptr; }
};

}  // namespace optree
