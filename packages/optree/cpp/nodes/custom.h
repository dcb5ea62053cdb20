// SPDX-License-Identifier: Apache-2.0
// Registered classes; the slots are the registration, the metadata and the entries (or null).
#pragma once

#include "nodes/sequence.h"

namespace optree {

struct Custom {
    static constexpr const char* kName = "custom";
    // slot[0] must hold the registration already.
    static std::uint32_t expand(Context& context, PyObject* object, ObjectStack& children,
                                Payload& payload);
    static PyObject* rebuild(State&, const Slot* slots, PyObject** children, std::size_t count);
    static void match(Context& context, const Slot* slots, std::uint32_t arity, PyObject* object,
                      ObjectStack& children);
    static Ref entry(const Slot* slots, std::uint32_t index) {
        if (slots[2] == nullptr) return index_entry(index);
        return Ref::borrow(PyTuple_GET_ITEM(as_object(slots[2]), index));
    }
    static PyObject* type(State&, const Slot* slots) noexcept {
        return as_registration(slots[0])->type;
    }
    static Ref data(const Slot* slots) { return Ref::borrow(as_object(slots[1])); }
};

}  // namespace optree
