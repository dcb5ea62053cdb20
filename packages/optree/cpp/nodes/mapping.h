// SPDX-License-Identifier: Apache-2.0
// Code shared by the mapping kinds, which match each other.
#pragma once

#include "nodes/layout.h"
#include "nodes/look_ahead.h"
#include "nodes/sequence.h"

namespace optree {

// Finds the key layout of a mapping and visits its values in traversal order. A mapping kind has
// two ways to find the layout: `gather_known` looks up keys seen before and runs no Python code,
// `scan_unknown` makes a new layout.
template <class Self, class Visitor>
OPTREE_INLINE Ref visit_values(Context& context, PyObject* object, Visitor& visitor) {
    {
        const CriticalSection reading(object);  // while values are borrowed
        // A walk over a whole tree has checked this. Only another thread can have emptied the
        // mapping since.
        constexpr bool asked = Visitor::kAsksEmpty && are_alike_if_empty(kKindOf<Self>);
        if ((!asked || compat::kFreeThreaded) && Self::is_empty(context.state, object)) {
            return Ref::borrow(context.state.layouts().empty.get());
        }
        const auto size = static_cast<std::size_t>(PyDict_GET_SIZE(object));
        visitor.expect(size);
        PyObject** out = visitor.room(size);
        if (KeyLayout* known = Self::gather_known(context, object, out)) {
            visitor.put(out, size);
            return Ref::borrow(reinterpret_cast<PyObject*>(known));
        }
    }
    return Self::scan_unknown(context, object, visitor.stack());
}

// Pushes the values of `object` by the keys of `layout`. Raises an error that shows the differences
// if they do not match. `label` is the name of the spec's node in the message.
void match_mapping(Context& context, const KeyLayout* layout, const char* label, PyObject* object,
                   ObjectStack& children);

// Raises "dictionary key mismatch; expected key(s): ..." for two lists of keys. `suffix` ends the
// message.
[[noreturn]] OPTREE_COLD void raise_key_mismatch(PyObject* expected, PyObject* got,
                                                 PyObject* suffix);

template <class Self>
struct MappingKind : AnyNode {
    static constexpr const char* kEntryClass = "MappingEntry";
    static KeyLayout* keys(const Slot* slots) noexcept {
        return as_layout(slots[facts_of(kKindOf<Self>).keys]);
    }
    static bool is_empty(const State&, PyObject* object) noexcept {
        return PyDict_GET_SIZE(object) == 0;
    }
    template <class Visitor>
    OPTREE_INLINE static std::uint32_t visit(Context& context, PyObject* object, Visitor& visitor,
                                             Ref* slots) {
        Ref& layout = slots[facts_of(kKindOf<Self>).keys];
        layout = visit_values<Self>(context, object, visitor);
        return as_layout(layout.get())->size;
    }
    static void match(Context& context, const Slot* slots, std::uint32_t, PyObject* object,
                      ObjectStack& children) {
        match_mapping(context, keys(slots), Self::kName, object, children);
    }
    static std::string text(const Slot* slots, const Texts& children) {
        return call_of_braces(Self::kName, keys(slots), children);
    }
};

}  // namespace optree
