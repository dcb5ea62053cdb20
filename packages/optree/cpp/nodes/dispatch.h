// SPDX-License-Identifier: Apache-2.0
// The one switch on the kind of a node. Every kind has the same static members:
//
//   kName                                 name in messages
//   expand(context, object, out, payload) pushes the children (new references) in traversal order,
//                                         fills the payload, returns their number
//   rebuild(state, slots, children, n)    a new object that takes over the children; null on error
//   match(context, slots, arity, object, out)
//                                         pushes the children of an object that must match the node
//   entry(slots, i)                       what leads to child i: an index or a key
//   type(state, slots)                    the class of the node, borrowed
//   data(slots)                           metadata shown to Python, null where there is none
#pragma once

#include <stdexcept>

#include "nodes/custom.h"
#include "nodes/defaultdict.h"
#include "nodes/deque.h"
#include "nodes/dict.h"
#include "nodes/list.h"
#include "nodes/namedtuple.h"
#include "nodes/none.h"
#include "nodes/ordereddict.h"
#include "nodes/structseq.h"
#include "nodes/tuple.h"

namespace optree {

// Calls `visit` with an empty value of the kind's class.
template <class Visit>
OPTREE_INLINE decltype(auto) dispatch(Kind kind, Visit&& visit) {
    switch (kind) {
        case Kind::none: return visit(None{});
        case Kind::tuple: return visit(Tuple{});
        case Kind::list: return visit(List{});
        case Kind::dict: return visit(Dict{});
        case Kind::namedtuple: return visit(NamedTuple{});
        case Kind::ordereddict: return visit(OrderedDict{});
        case Kind::defaultdict: return visit(DefaultDict{});
        case Kind::deque: return visit(Deque{});
        case Kind::structseq: return visit(StructSeq{});
        case Kind::custom: return visit(Custom{});
        case Kind::leaf:
        case Kind::frozendict: break;
    }
    throw std::logic_error("not the kind of an internal node");
}

inline const char* kind_name(Kind kind) {
    return dispatch(kind, [](auto node) { return decltype(node)::kName; });
}

// Pushes the children of `object` and fills its payload, `registration` included.
inline std::uint32_t expand(Context& context, Kind kind, Registration* registration,
                            PyObject* object, ObjectStack& children, Payload& payload) {
    if (kind == Kind::custom)
        payload.slot[0] = Ref::borrow(reinterpret_cast<PyObject*>(registration));
    return dispatch(kind, [&](auto node) {
        return decltype(node)::expand(context, object, children, payload);
    });
}

inline PyObject* rebuild(State& state, Kind kind, const Slot* slots, PyObject** children,
                         std::size_t count) {
    return dispatch(
        kind, [&](auto node) { return decltype(node)::rebuild(state, slots, children, count); });
}

inline void match(Context& context, Kind kind, const Slot* slots, std::uint32_t arity,
                  PyObject* object, ObjectStack& children) {
    dispatch(kind,
             [&](auto node) { decltype(node)::match(context, slots, arity, object, children); });
}

inline Ref node_entry(Kind kind, const Slot* slots, std::uint32_t index) {
    return dispatch(kind, [&](auto node) { return decltype(node)::entry(slots, index); });
}

inline PyObject* node_type(State& state, Kind kind, const Slot* slots) {
    return dispatch(kind, [&](auto node) { return decltype(node)::type(state, slots); });
}

inline Ref node_data(Kind kind, const Slot* slots) {
    return dispatch(kind, [&](auto node) { return decltype(node)::data(slots); });
}

}  // namespace optree
