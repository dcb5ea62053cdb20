// SPDX-License-Identifier: Apache-2.0
// The structure of a tree: nodes, payload slots and the number of leaves. Independent of Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <stdexcept>

#include "spec/node.h"

namespace optree {

struct Tree {
    NodeTable nodes;           // post-order
    SlotTable slots;           // in node order: node i owns slots[payload, payload + slot_count)
    std::uint32_t leaves = 0;  // number of leaf tokens

    std::uint64_t num_nodes() const noexcept { return std::uint64_t{leaves} + nodes.size(); }
    bool is_leaf() const noexcept { return nodes.empty() && leaves == 1; }
    const Node& root() const noexcept { return nodes.back(); }
    std::size_t num_children() const noexcept { return nodes.empty() ? 0 : root().arity; }
};

// The maximum number of leaves in a tree, of internal nodes, and of payload slots.
inline constexpr std::uint64_t kMaxCount = std::numeric_limits<std::uint32_t>::max() - 1;

// Separate from the check so that the check is inlined.
[[noreturn]] inline void raise_too_many() {
    throw std::length_error("a tree holds at most 4294967294 leaves and as many nodes");
}

// A count that was computed with 64 bits on every platform: a spec of a few megabytes can have as
// many leaves as fit.
inline std::uint32_t checked_count(std::uint64_t count) {
    if (count > kMaxCount) raise_too_many();
    return static_cast<std::uint32_t>(count);
}

// Calls leaf() and on_node(node) for the tokens in post-order.
template <class Leaf, class OnNode>
void visit_tokens(const Tree& tree, Leaf&& leaf, OnNode&& on_node) {
    std::uint32_t taken = 0;
    for (const Node& node : tree.nodes) {
        for (; taken < node.leaf_end; ++taken) leaf();
        on_node(node);
    }
    if (tree.nodes.empty() && tree.leaves != 0) leaf();
}

// A position in the reversed token sequence. Reversed post-order is pre-order from right to left:
// the root comes first, then its last child.
//
//     for (Cursor c = Cursor::end_of(tree); !c.done();) {
//         if (const Node* node = c.node()) { ...; c.enter(); } else { ...; c.leaf(); }
//     }
struct Cursor {
    const Node* table;
    std::uint32_t node_end;  // the next internal token is table[node_end - 1]
    std::uint32_t leaf_end;  // the next leaf token is leaf_end - 1

    static Cursor end_of(const Tree& tree) noexcept {
        return {tree.nodes.data(), static_cast<std::uint32_t>(tree.nodes.size()), tree.leaves};
    }
    // Whether the position is before the first token.
    bool done() const noexcept { return node_end == 0 && leaf_end == 0; }
    // The internal node at this position, or null for a leaf.
    const Node* node() const noexcept {
        if (node_end != 0 && table[node_end - 1].leaf_end == leaf_end) return table + node_end - 1;
        return nullptr;
    }
    void enter() noexcept { --node_end; }
    void leaf() noexcept { --leaf_end; }
    // Skips the whole subtree at this position.
    void skip() noexcept {
        if (const Node* top = node()) {
            node_end -= top->span;
            leaf_end -= top->leaves;
        } else {
            --leaf_end;
        }
    }
    std::uint32_t subtree_leaves() const noexcept {
        const Node* top = node();
        return top != nullptr ? top->leaves : 1;
    }
};

// One subtree as two ranges of a table: internal nodes [first, last) and leaf tokens [leaf, leaf +
// leaves).
struct Subtree {
    std::uint32_t first_node, last_node;
    std::uint32_t first_leaf, leaves;

    bool is_leaf() const noexcept { return first_node == last_node; }
    const Node& root(const Tree& tree) const noexcept { return tree.nodes[last_node - 1]; }
};

inline Subtree whole(const Tree& tree) noexcept {
    return {0, static_cast<std::uint32_t>(tree.nodes.size()), 0, tree.leaves};
}

inline Subtree subtree_at(const Cursor& cursor) noexcept {
    Cursor after = cursor;
    after.skip();
    return {after.node_end, cursor.node_end, after.leaf_end, cursor.leaf_end - after.leaf_end};
}

// The number of payload slots of a subtree.
inline std::uint64_t slots_of_part(const Tree& tree, const Subtree& part) noexcept {
    if (part.is_leaf()) return 0;
    const Node& last = part.root(tree);
    return last.payload + slot_count(last.kind) - tree.nodes[part.first_node].payload;
}

// The subtrees of the children of `parent` (an internal subtree), from first to last.
template <std::size_t N>
void children_of(const Tree& tree, const Subtree& parent, Stack<Subtree, N>& out) {
    const std::uint32_t arity = parent.root(tree).arity;
    Cursor cursor{tree.nodes.data(), parent.last_node, parent.first_leaf + parent.leaves};
    cursor.enter();
    out.resize(arity);
    for (std::uint32_t i = arity; i-- > 0; cursor.skip()) out[i] = subtree_at(cursor);
}

// Appends tokens in post-order and maintains the counts of every node.
//
//     Builder build(tree); build.leaf(); build.leaf(); build.close(Kind::tuple, 2);  // (*, *)
//
// The caller pushes the slots in node order before `close`.
class Builder {
  public:
    explicit Builder(Tree& tree) : tree_(tree) {}

    void leaf() {
        starts_.push_back({tree_.leaves, nodes()});
        tree_.leaves = checked_count(std::uint64_t{tree_.leaves} + 1);
    }

    void close(Kind kind, std::uint32_t arity) {
        if (arity > starts_.size()) throw std::logic_error("post-order closes more than it opened");
        Start start = arity != 0 ? starts_[starts_.size() - arity] : Start{tree_.leaves, nodes()};
        starts_.resize(starts_.size() - arity);
        const std::uint32_t payload = checked_count(tree_.slots.size() - slot_count(kind));
        const std::uint32_t span = checked_count(tree_.nodes.size() + 1) - start.node;
        tree_.nodes.push_back(
            {kind, payload, arity, tree_.leaves - start.leaf, span, tree_.leaves});
        starts_.push_back(start);
    }

    // Appends a copy of `part` of `from`. Calls `copy_slot` once for each slot; it returns the slot
    // to store (for example a new reference).
    template <class CopySlot>
    void append(const Tree& from, const Subtree& part, CopySlot&& copy_slot) {
        const Start start{tree_.leaves, nodes()};
        const std::uint32_t leaf_base = tree_.leaves - part.first_leaf;  // may wrap and wrap back
        checked_count(std::uint64_t{tree_.leaves} + part.leaves);
        checked_count(std::uint64_t{nodes()} + part.last_node - part.first_node);
        checked_count(tree_.slots.size() + slots_of_part(from, part));
        for (std::uint32_t i = part.first_node; i < part.last_node; ++i) {
            Node node = from.nodes[i];
            const std::size_t count = slot_count(node.kind);
            const Slot* slots = from.slots.data() + node.payload;
            node.payload = static_cast<std::uint32_t>(tree_.slots.size());
            for (std::size_t s = 0; s < count; ++s) tree_.slots.push_back(copy_slot(slots[s]));
            node.leaf_end += leaf_base;
            tree_.nodes.push_back(node);
        }
        tree_.leaves += part.leaves;
        starts_.push_back(start);
    }

    // The number of complete subtrees that no node encloses yet; 1 for a complete tree.
    std::size_t open() const noexcept { return starts_.size(); }

    // The leaves of the last subtree appended, and its internal nodes.
    std::uint32_t last_leaves() const { return tree_.leaves - starts_.back().leaf; }
    std::uint32_t last_span() const { return nodes() - starts_.back().node; }

  private:
    struct Start {
        std::uint32_t leaf, node;
    };
    std::uint32_t nodes() const noexcept { return static_cast<std::uint32_t>(tree_.nodes.size()); }

    Tree& tree_;
    Stack<Start> starts_;
};

}  // namespace optree
