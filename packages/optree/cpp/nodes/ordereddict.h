// SPDX-License-Identifier: Apache-2.0
// collections.OrderedDict: traversed and rebuilt in its own order.
#pragma once

#include "cpython/odict_list.h"
#include "nodes/gather.h"
#include "nodes/mapping.h"

namespace optree {

struct OrderedDict {
    static constexpr const char* kName = "OrderedDict";
    static bool is_empty(const State&, PyObject* object) noexcept {
        return odict_list_is_readable() ? odict_is_empty(object) : PyDict_GET_SIZE(object) == 0;
    }
    // A layout found by the order of the dict underneath is right if the list agrees with it.
    //
    // Inlined into the walk: 3 % of the instructions of flatten on module trees (benchmarks/optree).
    OPTREE_INLINE static KeyLayout* gather_known(Context& context, PyObject* object,
                                                 PyObject** out) {
        if (OPTREE_UNLIKELY(!odict_list_is_readable() || PyDict_GET_SIZE(object) == 0 ||
                            !only_grew(object))) {
            return nullptr;
        }
        KeyLayout* known = optree::gather_known(context.state.layouts(), object, false, out);
        const bool agrees = known != nullptr && odict_has(object, known->inserted, known->size);
        return OPTREE_LIKELY(agrees) ? known : nullptr;
    }
    static Ref scan_unknown(Context& context, PyObject* object, ObjectStack& children);
    static std::uint32_t expand(Context& context, PyObject* object, ObjectStack& children,
                                Payload& payload) {
        payload.slot[0] = scan_mapping<OrderedDict>(context, object, children);
        return as_layout(payload.slot[0].get())->size;
    }
    static PyObject* rebuild(State&, const Slot* slots, PyObject** children, std::size_t) {
        return new_ordered_dict_of(as_layout(slots[0]), children);
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
