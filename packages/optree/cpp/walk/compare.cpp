// SPDX-License-Identifier: Apache-2.0
#include "walk/compare.h"

#include <algorithm>
#include <vector>

namespace optree {
namespace {

// Specs whose hash this thread is computing: a key may hold the spec again. Their nested hash is 0,
// so specs that refer to each other get equal hashes.
thread_local Stack<const SpecObject*, 4> hashing;

}  // namespace

bool spec_equal(const SpecObject& a, const SpecObject& b) {
    if (&a == &b) return true;
    if (a.none_is_leaf != b.none_is_leaf || !same_shape(a.tree, b.tree)) return false;
    if (!namespaces_agree(a.name, b.name)) return false;
    // Comparing may run Python code, which cannot change a tree: specs are immutable.
    for (const Node& node : a.tree.nodes) {
        const Slot* slots_a = slots_of(a.tree, node);
        const Slot* slots_b = slots_of(b.tree, node);
        if (!dispatch_slots(node.kind, [&](auto list) { return list.equal(slots_a, slots_b); })) {
            return false;
        }
    }
    return true;
}

Py_hash_t spec_hash(SpecObject& spec) {
    if (OPTREE_UNLIKELY(!hashing.empty())) {
        if (std::find(hashing.begin(), hashing.end(), &spec) != hashing.end()) return 0;
        check_stack();
    }
    struct Guard {
        explicit Guard(const SpecObject* self) { hashing.push_back(self); }
        ~Guard() { hashing.pop_back(); }
    } guard(&spec);
    const Ref alive = Ref::borrow(reinterpret_cast<PyObject*>(&spec));

    std::uint64_t hash = combine(spec.none_is_leaf ? 1 : 0, spec.tree.leaves);
    for (const Node& node : spec.tree.nodes) {
        hash = hash_node(hash, node);
        const Slot* slots = slots_of(spec.tree, node);
        hash = dispatch_slots(node.kind, [&](auto list) { return list.hash(hash, slots); });
    }
    const auto result = static_cast<Py_hash_t>(mix(hash));
    return result == -1 ? -2 : result;
}

bool align_keys(const KeyLayout* a, const KeyLayout* b, Stack<std::uint32_t>& index_in_b) {
    if (a->size != b->size) return false;
    index_in_b.resize(a->size);
    bool same = true;
    for (std::uint32_t i = 0; i < a->size && same; ++i) same = a->keys[i] == b->keys[i];
    if (same) {
        for (std::uint32_t i = 0; i < a->size; ++i) index_in_b[i] = i;
        return true;
    }
    const Ref positions = positions_of(b->keys, b->size);
    for (std::uint32_t i = 0; i < a->size; ++i) {
        const std::size_t at = position_in(positions.get(), a->keys[i], b->size);
        if (at == b->size) return false;
        index_in_b[i] = static_cast<std::uint32_t>(at);
    }
    return true;
}

bool spec_is_prefix(const SpecObject& a, const SpecObject& b, bool strict) {
    if (a.none_is_leaf != b.none_is_leaf || !namespaces_agree(a.name, b.name)) return false;
    if (a.tree.num_nodes() > b.tree.num_nodes()) return false;
    if (&a == &b) return !strict;
    bool faces_node = false;  // some leaf of `a` corresponds to an internal node of `b`
    struct Pair {
        Subtree a, b;
    };
    std::vector<Pair> agenda{{whole(a.tree), whole(b.tree)}};
    Stack<Subtree, 8> children_a;
    Stack<Subtree, 8> children_b;
    Stack<std::uint32_t> order;
    while (!agenda.empty()) {
        const Pair pair = agenda.back();
        agenda.pop_back();
        if (pair.a.is_leaf()) {
            faces_node = faces_node || !pair.b.is_leaf();
            continue;
        }
        if (pair.b.is_leaf()) return false;
        const Node& node_a = pair.a.root(a.tree);
        const Node& node_b = pair.b.root(b.tree);
        const Slot* slots_a = slots_of(a.tree, node_a);
        const Slot* slots_b = slots_of(b.tree, node_b);
        if (node_a.arity != node_b.arity) return false;
        bool reordered = false;
        if (is_mapping_pair(node_a.kind, node_b.kind)) {
            const KeyLayout* keys_a = keys_of(node_a.kind, slots_a);
            const KeyLayout* keys_b = keys_of(node_b.kind, slots_b);
            reordered = keys_a != keys_b;
            if (reordered && !align_keys(keys_a, keys_b, order)) return false;
        } else if (node_a.kind != node_b.kind || !dispatch_slots(node_a.kind, [&](auto list) {
                       return list.equal_in_prefix(slots_a, slots_b);
                   })) {
            return false;
        }
        children_of(a.tree, pair.a, children_a);
        children_of(b.tree, pair.b, children_b);
        for (std::uint32_t i = 0; i < node_a.arity; ++i) {
            agenda.push_back({children_a[i], children_b[reordered ? order[i] : i]});
        }
    }
    return !strict || faces_node;
}

}  // namespace optree
