// SPDX-License-Identifier: Apache-2.0
// Plain dicts: traversed in sorted key order (or as inserted), rebuilt as inserted.
#pragma once

#include "nodes/gather.h"
#include "nodes/mapping.h"

namespace optree {

struct Dict {
    static constexpr const char* kName = "dict";
    static bool is_empty(const State&, PyObject* object) noexcept {
        return PyDict_GET_SIZE(object) == 0;
    }
    OPTREE_INLINE static KeyLayout* gather_known(Context& context, PyObject* object,
                                                 PyObject** out) {
        return optree::gather_known(context.state.layouts(), object, context.sorted, out);
    }
    static Ref scan_unknown(Context& context, PyObject* object, ObjectStack& children) {
        return optree::scan_unknown(context.state.layouts(), context.state.layout(), object,
                                    context.sorted, children);
    }
    static std::uint32_t expand(Context& context, PyObject* object, ObjectStack& children,
                                Payload& payload) {
        payload.slot[0] = scan_mapping<Dict>(context, object, children);
        return as_layout(payload.slot[0].get())->size;
    }
    static PyObject* rebuild(State&, const Slot* slots, PyObject** children, std::size_t) {
        return new_dict_of(as_layout(slots[0]), children);
    }
    static void match(Context& context, const Slot* slots, std::uint32_t, PyObject* object,
                      ObjectStack& children) {
        match_mapping(context, as_layout(slots[0]), kName, object, children);
    }
    static Ref entry(const Slot* slots, std::uint32_t index) {
        return Ref::borrow(as_layout(slots[0])->keys[index]);
    }
    static PyObject* type(State&, const Slot*) noexcept { return type_object(&PyDict_Type); }
    static Ref data(const Slot* slots) { return layout_keys(as_layout(slots[0])); }
};

}  // namespace optree
