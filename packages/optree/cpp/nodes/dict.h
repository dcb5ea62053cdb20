// SPDX-License-Identifier: Apache-2.0
// Plain dicts: traversed in sorted key order (or insertion order), rebuilt in insertion order.
#pragma once

#include "nodes/gather.h"
#include "nodes/mapping.h"

namespace optree {

// Mappings that follow the dict mode.
template <class Self>
struct DictKind : MappingKind<Self> {
    OPTREE_INLINE static KeyLayout* gather_known(Context& context, PyObject* object,
                                                 PyObject** out) {
        return optree::gather_known(context.state.layouts(), object, context.sorted, out);
    }
    OPTREE_NOINLINE static Ref scan_unknown(Context& context, PyObject* object,
                                            ObjectStack& children) {
        return optree::scan_unknown(context.state.layouts(), context.state.layout(), object,
                                    context.sorted, children);
    }
};

struct Dict : DictKind<Dict> {
    static constexpr const char* kName = "dict";
    static constexpr bool kRebuildsQuietly = true;
    static Ref find_class() { return Ref::borrow(type_object(&PyDict_Type)); }
    static PyObject* rebuild(State& state, const Slot* slots, PyObject** children, std::size_t) {
        return new_dict_of(state, keys(slots), children);
    }
    static std::string text(const Slot* slots, const Texts& children) {
        return braces(keys(slots), children);
    }
};

}  // namespace optree
