// SPDX-License-Identifier: Apache-2.0
// collections.defaultdict; the slots are the key layout and the default factory.
#pragma once

#include "nodes/dict.h"

namespace optree {

struct DefaultDict {
    static constexpr const char* kName = "defaultdict";
    static std::uint32_t expand(Context& context, PyObject* object, ObjectStack& children,
                                Payload& payload) {
        payload.slot[1] =
            checked(PyObject_GetAttr(object, context.state.str_default_factory.get()));
        return Dict::expand(context, object, children, payload);
    }
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children, std::size_t) {
        PyObject* made = PyObject_CallOneArg(state.defaultdict_type.get(), as_object(slots[1]));
        return fill_mapping<PyDict_SetItem>(made, as_layout(slots[0]), children);
    }
    static void match(Context& context, const Slot* slots, std::uint32_t, PyObject* object,
                      ObjectStack& children) {
        match_mapping(context, as_layout(slots[0]), kName, object, children);
    }
    static Ref entry(const Slot* slots, std::uint32_t index) { return Dict::entry(slots, index); }
    static PyObject* type(State& state, const Slot*) noexcept {
        return state.defaultdict_type.get();
    }
    static Ref data(const Slot* slots) {
        const Ref keys = layout_keys(as_layout(slots[0]));
        return checked(PyTuple_Pack(2, as_object(slots[1]), keys.get()));
    }
};

}  // namespace optree
