// SPDX-License-Identifier: Apache-2.0
// collections.OrderedDict: traversed and rebuilt in its own order.
#pragma once

#include "cpython/odict_list.h"
#include "nodes/mapping.h"

namespace optree {

struct OrderedDict {
    static constexpr const char* kName = "OrderedDict";
    static bool is_empty(const State&, PyObject* object) noexcept {
        return odict_list_is_readable() ? odict_is_empty(object) : PyDict_GET_SIZE(object) == 0;
    }
    static KeyLayout* gather_known(Context& context, PyObject* object, PyObject** out);
    static Ref scan_unknown(Context& context, PyObject* object, ObjectStack& children);
    static std::uint32_t expand(Context& context, PyObject* object, ObjectStack& children,
                                Payload& payload) {
        payload.slot[0] = scan_mapping<OrderedDict>(context, object, children);
        return as_layout(payload.slot[0].get())->size;
    }
    static PyObject* rebuild(State&, const Slot* slots, PyObject** children, std::size_t) {
        return fill_mapping<PyODict_SetItem>(PyODict_New(), as_layout(slots[0]), children);
    }
    static void match(Context& context, const Slot* slots, std::uint32_t, PyObject* object,
                      ObjectStack& children) {
        match_mapping(context, as_layout(slots[0]), kName, object, children);
    }
    static Ref entry(const Slot* slots, std::uint32_t index) {
        return Ref::borrow(as_layout(slots[0])->keys[index]);
    }
    static PyObject* type(State&, const Slot*) noexcept { return type_object(&PyODict_Type); }
    static Ref data(const Slot* slots) { return layout_keys(as_layout(slots[0])); }
};

}  // namespace optree
