// SPDX-License-Identifier: Apache-2.0
// collections.OrderedDict: traversed and rebuilt in its own order.
#pragma once

#include "cpython/odict_list.h"
#include "nodes/gather.h"
#include "nodes/mapping.h"

namespace optree {

struct OrderedDict : MappingKind<OrderedDict> {
    static constexpr const char* kName = "OrderedDict";
    static constexpr bool kRebuildsQuietly = true;
    static Ref find_class() { return Ref::borrow(type_object(&PyODict_Type)); }
    static bool is_empty(const State&, PyObject* object) noexcept {
        // The underlying dict proves nothing: it may have been emptied without an update of the
        // list.
        return odict_list_is_readable() && odict_is_empty(object);
    }
    // A layout found by the order of the underlying dict is right if the list agrees with it.
    //
    // Inlined into the walk, which saves 3 % of the instructions of flatten on module trees
    // (benchmarks/optree).
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
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children, std::size_t) {
        return new_ordered_dict_of(state, keys(slots), children);
    }
};

}  // namespace optree
