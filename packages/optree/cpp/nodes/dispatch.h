// SPDX-License-Identifier: Apache-2.0
// The only switch on the kind of a node, generated from kinds.def. A kind is a class with the
// static members below. AnyNode (node.h), RecordKind and MappingKind provide some of them.
//
//   kName                           name in messages
//   find_class(), recognises(state, type)
//                                   the class of the nodes, or whether a subclass of tuple is such a class
//   is_empty(state, object)         whether there are no children
//   visit(context, object, visitor, slots)
//                                   shows the children to a visitor (node.h) in traversal order, fills
//                                   the slots, returns the number of children
//   rebuild(state, slots, children, n)
//                                   a new object that takes over the children; null on error
//   match(context, slots, arity, object, out)
//                                   pushes the children of an object that must match the node
//   step(slots, i, entry), text(slots, texts)
//                                   what leads to child i, and the node, as Python code
//   verify(read, slots)             raises what is wrong with a pickled node
//
// The types of its slots, listed in kinds.def, manage the slots of a kind (slots.h).
#pragma once

#include <stdexcept>

#include "nodes/custom.h"
#include "nodes/defaultdict.h"
#include "nodes/deque.h"
#include "nodes/dict.h"
#include "nodes/frozendict.h"
#include "nodes/list.h"
#include "nodes/namedtuple.h"
#include "nodes/none.h"
#include "nodes/ordereddict.h"
#include "nodes/structseq.h"
#include "nodes/tuple.h"

namespace optree {

template <class Node>
struct SlotsOf;
#define OPTREE_KIND(value, name, python_name, cls, ...) \
    template <>                                         \
    struct SlotsOf<cls> : SlotList<__VA_ARGS__> {};
#define OPTREE_VALUE(value, name, python_name)
#include "spec/kinds.def"

// Calls `visit` with an empty value of the kind's class.
template <class Visit>
OPTREE_INLINE decltype(auto) dispatch(Kind kind, Visit&& visit) {
    switch (kind) {
#define OPTREE_KIND(value, name, python_name, cls, ...) \
    case Kind::name: return visit(cls{});
#define OPTREE_VALUE(value, name, python_name) \
    case Kind::name: break;
#include "spec/kinds.def"
    }
    throw std::logic_error("not the kind of an internal node");
}

// Calls `visit` with an empty value of each class, in the order of their numbers, until it returns
// false.
template <class Visit>
OPTREE_INLINE void for_each_kind(Visit&& visit) {
    (void)(
#define OPTREE_KIND(value, name, python_name, cls, ...) visit(cls{}) &&
#define OPTREE_VALUE(value, name, python_name)
#include "spec/kinds.def"
        true);
}

// The same for the class of the slots.
template <class Visit>
OPTREE_INLINE decltype(auto) dispatch_slots(Kind kind, Visit&& visit) {
    return dispatch(kind, [&](auto node) { return visit(SlotsOf<decltype(node)>{}); });
}

inline const char* kind_name(Kind kind) {
    return dispatch(kind, [](auto node) { return decltype(node)::kName; });
}
inline const char* entry_class(Kind kind) {
    return dispatch(kind, [](auto node) { return decltype(node)::kEntryClass; });
}
inline bool is_named_by_class(Kind kind) {
    return dispatch(kind, [](auto node) { return decltype(node)::kNamedByClass; });
}
inline const char* arity_name(Kind kind) {
    return dispatch(kind, [](auto node) {
        return decltype(node)::kArityName != nullptr ? decltype(node)::kArityName
                                                     : decltype(node)::kName;
    });
}

// Pushes the children of `object` and fills its payload, `registration` included.
inline std::uint32_t expand(Context& context, Kind kind, Registration* registration,
                            PyObject* object, ObjectStack& children, Payload& payload) {
    Collect collect(children);
    if (is_custom(kind)) payload.slot[0] = Ref::borrow(reinterpret_cast<PyObject*>(registration));
    return dispatch(kind, [&](auto node) {
        return decltype(node)::visit(context, object, collect, payload.slot);
    });
}

OPTREE_INLINE PyObject* rebuild(State& state, Kind kind, const Slot* slots, PyObject** children,
                                std::size_t count) {
    return dispatch(kind, [&](auto node) OPTREE_INLINE_LAMBDA {
        using Node = decltype(node);
        const auto make = [&] { return Node::rebuild(state, slots, children, count); };
        if constexpr (Node::kRebuildsQuietly) {
            return make();
        } else {
            return state.running_python(make);
        }
    });
}

// A node of contiguous leaves, created at once. Null if its kind or the row of leaves does not
// allow this, and null with an exception set on error.
template <class Find>
inline PyObject* copy_row(Kind kind, std::size_t count, Find&& find) {
    return dispatch(kind, [&](auto node) -> PyObject* {
        using Node = decltype(node);
        if constexpr (Node::kCopies) return Node::copy(count, find);
        return nullptr;
    });
}

inline void match(Context& context, Kind kind, const Slot* slots, std::uint32_t arity,
                  PyObject* object, ObjectStack& children) {
    dispatch(kind,
             [&](auto node) { decltype(node)::match(context, slots, arity, object, children); });
}

inline Ref node_entry(Kind kind, const Slot* slots, std::uint32_t index) {
    Ref entry = dispatch_slots(kind, [&](auto list) { return list.entry(slots, index); });
    return entry ? std::move(entry) : index_entry(index);
}

inline Ref node_step(Kind kind, const Slot* slots, std::uint32_t index) {
    const Ref entry = node_entry(kind, slots, index);
    return dispatch(kind,
                    [&](auto node) { return decltype(node)::step(slots, index, entry.get()); });
}

inline std::string node_text(Kind kind, const Slot* slots, const Texts& children) {
    return dispatch(kind, [&](auto node) { return decltype(node)::text(slots, children); });
}

// The class of a node, borrowed.
inline PyObject* node_type(State& state, Kind kind, const Slot* slots) {
    PyObject* type = dispatch_slots(kind, [&](auto list) { return list.type(slots); });
    return type != nullptr ? type : state.classes[static_cast<int>(kind)].get();
}

// The metadata as shown to Python; null if there is none. `make_keys(layout)` makes a list of keys
// that follows the dict mode.
template <class MakeKeys>
Ref node_data(Kind kind, const Slot* slots, MakeKeys&& make_keys) {
    return dispatch_slots(kind, [&](auto list) { return list.data(slots, make_keys); });
}
inline Ref node_data(Kind kind, const Slot* slots) { return node_data(kind, slots, layout_keys); }

// Whether this Python has nodes of a kind. The class of a mapping kind may be missing.
inline bool is_available(const State& state, Kind kind) noexcept {
    return facts_of(kind).is_node &&
           (!is_mapping(kind) || state.classes[static_cast<int>(kind)].get() != nullptr);
}

// Null for nodes that are not mappings.
inline KeyLayout* keys_of(Kind kind, const Slot* slots) noexcept {
    return is_mapping(kind) ? as_layout(slots[facts_of(kind).keys]) : nullptr;
}
// Null for nodes of kinds without a registration.
inline Registration* registration_of(Kind kind, const Slot* slots) noexcept {
    return is_custom(kind) ? as_registration(slots[facts_of(kind).registered]) : nullptr;
}

}  // namespace optree
