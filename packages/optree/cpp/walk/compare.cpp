// SPDX-License-Identifier: Apache-2.0
#include "walk/compare.h"

#include <vector>

namespace optree {
namespace {

bool equal_payload(Kind kind, const Slot* a, const Slot* b) {
    switch (kind) {
        case Kind::dict:
        case Kind::frozendict:
        case Kind::ordereddict: return same_keys(as_layout(a[0]), as_layout(b[0]));
        case Kind::defaultdict:
            return equal(as_object(a[1]), as_object(b[1])) &&
                   same_keys(as_layout(a[0]), as_layout(b[0]));
        case Kind::deque:
            if (a[0] == nullptr || b[0] == nullptr) return a[0] == b[0];
            return equal(as_object(a[0]), as_object(b[0]));
        case Kind::namedtuple:
        case Kind::structseq: return equal(as_object(a[0]), as_object(b[0]));
        case Kind::custom: return a[0] == b[0] && equal(as_object(a[1]), as_object(b[1]));
        default: return true;
    }
}

}  // namespace

bool spec_equal(const SpecObject& a, const SpecObject& b) {
    if (&a == &b) return true;
    if (a.none_is_leaf != b.none_is_leaf || !same_shape(a.tree, b.tree)) return false;
    if (!namespaces_agree(a.name, b.name)) return false;
    // Comparing may run Python code, which can't change a tree: specs are immutable.
    for (const Node& node : a.tree.nodes) {
        if (!equal_payload(node.kind, a.tree.slots.data() + node.payload,
                           b.tree.slots.data() + node.payload)) {
            return false;
        }
    }
    return true;
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
    const Ref where = checked(PyDict_New());
    for (std::uint32_t i = 0; i < b->size; ++i) {
        const Ref number = checked(PyLong_FromSize_t(i));
        check_status(PyDict_SetItem(where.get(), b->keys[i], number.get()));
    }
    for (std::uint32_t i = 0; i < a->size; ++i) {
        PyObject* number = PyDict_GetItemWithError(where.get(), a->keys[i]);
        if (number == nullptr) {
            if (PyErr_Occurred()) throw PythonError{};
            return false;
        }
        index_in_b[i] = static_cast<std::uint32_t>(PyLong_AsUnsignedLong(number));
    }
    return true;
}

bool spec_is_prefix(const SpecObject& a, const SpecObject& b, bool strict) {
    if (a.none_is_leaf != b.none_is_leaf || !namespaces_agree(a.name, b.name)) return false;
    if (a.tree.num_nodes() > b.tree.num_nodes()) return false;
    if (&a == &b) return !strict;
    bool faces_node = false;  // some leaf of `a` faces an internal node of `b`
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
            if (as_layout(slots_a[0]) != as_layout(slots_b[0])) {
                if (!align_keys(as_layout(slots_a[0]), as_layout(slots_b[0]), order)) return false;
                reordered = true;
            }
        } else if (node_a.kind != node_b.kind) {
            return false;
        } else if (node_a.kind != Kind::deque && !equal_payload(node_a.kind, slots_a, slots_b)) {
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
