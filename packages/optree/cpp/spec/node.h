// SPDX-License-Identifier: Apache-2.0
// One internal node of a tree, and the table of nodes. The only file that uses abseil.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "absl/container/inlined_vector.h"
#include "spec/kind.h"

namespace optree {

// Leaves have no node. The internal nodes of a tree are stored in post-order. Each stores the
// number of leaves before it in the whole table, which gives the position of every leaf:
//
//     {'a': *, 'b': (*, *), 'c': *}      post-order tokens:  *  *  *  tuple  *  dict
//
//     nodes[0] = {tuple, arity 2, leaves 2, span 1, leaf_end 3}
//     nodes[1] = {dict,  arity 3, leaves 4, span 2, leaf_end 4}
//
// There are leaf_end[i] - leaf_end[i-1] leaf tokens between nodes[i-1] and nodes[i]. A tree that is
// one leaf has an empty table.
struct Node {
    Kind kind;               // never Kind::leaf
    std::uint32_t payload;   // index of the first payload slot; see slot_count()
    std::uint32_t arity;     // number of children
    std::uint32_t leaves;    // number of leaves below this node
    std::uint32_t span;      // number of internal nodes of the subtree, this one included
    std::uint32_t leaf_end;  // number of leaf tokens before this node in the table
};

// Tables are compared bytewise.
static_assert(std::is_trivially_copyable_v<Node> && sizeof(Node) == 24 &&
              std::has_unique_object_representations_v<Node>);

// New elements are left uninitialised: each table that grows by `resize` is overwritten at once.
// Filling one element after the other took 5 % of flatten on module trees
// (benchmarks/optree/instructions.py).
template <class T>
struct Unfilled : std::allocator<T> {
    Unfilled() = default;
    template <class U>
    Unfilled(const Unfilled<U>&) noexcept {}
    template <class U>
    struct rebind {
        using other = Unfilled<U>;
    };
    template <class U>
    void construct(U*) noexcept {}
    template <class U, class... Args>
    void construct(U* place, Args&&... args) {
        ::new (static_cast<void*>(place)) U(std::forward<Args>(args)...);
    }
};

// Inline capacities: most trees built per call have only a few internal nodes.
using NodeTable = absl::InlinedVector<Node, 3, Unfilled<Node>>;

// An opaque payload; `spec/` never looks inside. The owner of the table owns it.
using Slot = void*;
using SlotTable = absl::InlinedVector<Slot, 3, Unfilled<Slot>>;

// Stacks of positions for the walks over a table.
template <class T, std::size_t N = 32>
using Stack = absl::InlinedVector<T, N>;

}  // namespace optree
