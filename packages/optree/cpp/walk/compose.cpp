// SPDX-License-Identifier: Apache-2.0
#include "walk/compose.h"

#include <vector>

#include "walk/compare.h"

namespace optree {
namespace {

void require_same_none(const SpecObject& a, const SpecObject& b) {
    if (a.none_is_leaf != b.none_is_leaf) {
        raise(PyExc_ValueError, "PyTreeSpecs must have the same none_is_leaf value.");
    }
}

// The name of a node in a message: its kind, or its class if the kind is not specific.
Ref label(State& state, Kind kind, const Slot* slots) {
    return is_named_by_class(kind) ? formatted("%R", node_type(state, kind, slots))
                                   : checked(PyUnicode_FromString(kind_name(kind)));
}

class Broadcaster {
  public:
    Broadcaster(const SpecObject& a, const SpecObject& b, Tree& out)
        : state_(state_of(a)), a_(a.tree), b_(b.tree), out_(out), build_(out) {}

    // Visits the pairs of subtrees from right to left, so the rightmost mismatch is reported. Then
    // builds the result from left to right: the reverse of pre-order from the right is post-order.
    // Uses an explicit stack, since structures may be deeper than the C stack allows.
    void merge() {
        agenda_.push_back({whole(a_), whole(b_), 0});
        while (!agenda_.empty()) {
            const Pair pair = agenda_.back();
            agenda_.pop_back();
            visit(pair);
        }
        for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
            if (step->close == nullptr) {
                build_.append(*step->from, step->part, share_slot);
            } else {
                share_payload(out_, step->close->kind, slots_of(a_, *step->close));
                build_.close(step->close->kind, step->close->arity);
            }
        }
    }

  private:
    struct Pair {
        Subtree a, b;
        int depth;
    };
    // Copies a subtree, or closes a node of `a` over the subtrees built so far.
    struct Step {
        const Tree* from;
        Subtree part;
        const Node* close;
    };

    void visit(const Pair& pair) {
        if (pair.a.is_leaf()) return steps_.push_back({&b_, pair.b, nullptr});
        if (pair.b.is_leaf()) return steps_.push_back({&a_, pair.a, nullptr});
        if (pair.depth > compat::kMaxDepth) {
            raise(PyExc_RecursionError,
                  "Maximum recursion depth exceeded during broadcasting the treespecs.");
        }
        const Node& node = pair.a.root(a_);
        Stack<std::uint32_t> order;
        const bool reordered = require_compatible(node, pair.b.root(b_), order);
        Stack<Subtree, 8> children_a;
        Stack<Subtree, 8> children_b;
        children_of(a_, pair.a, children_a);
        children_of(b_, pair.b, children_b);
        steps_.push_back({nullptr, {}, &node});
        for (std::uint32_t i = 0; i < node.arity; ++i) {
            agenda_.push_back(
                {children_a[i], children_b[reordered ? order[i] : i], pair.depth + 1});
        }
    }

    // Raises if the nodes cannot be merged. Returns true if the children of `b` are in the order
    // `order`.
    bool require_compatible(const Node& a, const Node& b, Stack<std::uint32_t>& order) {
        const Slot* slots_a = slots_of(a_, a);
        const Slot* slots_b = slots_of(b_, b);
        if (is_mapping_pair(a.kind, b.kind)) {
            const KeyLayout* keys_a = keys_of(a.kind, slots_a);
            const KeyLayout* keys_b = keys_of(b.kind, slots_b);
            if (align_keys(keys_a, keys_b, order)) return true;
            const Ref expected = layout_keys(keys_a);
            const Ref got = layout_keys(keys_b);
            raise_key_mismatch(expected.get(), got.get(), checked(PyUnicode_FromString(".")).get());
        }
        if (a.kind != b.kind) {
            const Ref expected = label(state_, a.kind, slots_a);
            const Ref got = label(state_, b.kind, slots_b);
            raise(PyExc_ValueError,
                  "PyTreeSpecs have incompatible node types; expected type: %U, got: %U.",
                  expected.get(), got.get());
        }
        const Registration* registration_a = registration_of(a.kind, slots_a);
        const Registration* registration_b = registration_of(b.kind, slots_b);
        if (registration_a != registration_b) {
            raise(PyExc_ValueError, "Custom node type mismatch; expected type: %R, got type: %R.",
                  registration_a->type, registration_b->type);
        }
        if (a.arity != b.arity) {
            raise(PyExc_ValueError, "%s arity mismatch; expected: %zd, got: %zd.",
                  arity_name(a.kind), static_cast<Py_ssize_t>(a.arity),
                  static_cast<Py_ssize_t>(b.arity));
        }
        dispatch_slots(a.kind,
                       [&](auto list) { list.require_same(slots_a, slots_b, kind_name(a.kind)); });
        return false;
    }

    State& state_;
    const Tree& a_;
    const Tree& b_;
    Tree& out_;
    Builder build_;
    std::vector<Pair> agenda_;
    std::vector<Step> steps_;
};

}  // namespace

PyObject* merged_namespace(const SpecObject& a, const SpecObject& b) {
    if (!namespaces_agree(a.name, b.name)) {
        raise(PyExc_ValueError, "PyTreeSpecs must have the same namespace, got %R vs. %R.", a.name,
              b.name);
    }
    if (is_empty_str(a.name) == is_empty_str(b.name)) return a.name;
    const SpecObject& unspecified = is_empty_str(a.name) ? a : b;
    PyObject* name = is_empty_str(a.name) ? b.name : a.name;
    require_same_registrations(unspecified, name, "PyTreeSpecs cannot be merged");
    return name;
}

Ref spec_compose(const SpecObject& outer, const SpecObject& inner) {
    require_same_none(outer, inner);
    PyObject* name = merged_namespace(outer, inner);
    const std::uint64_t copies = outer.tree.leaves;
    checked_count(copies * inner.tree.leaves);
    checked_count(outer.tree.nodes.size() + copies * inner.tree.nodes.size());
    checked_count(outer.tree.slots.size() + copies * inner.tree.slots.size());
    TreeOwner owner;
    Builder build(owner.tree);
    visit_tokens(
        outer.tree, [&] { build.append(inner.tree, whole(inner.tree), share_slot); },
        [&](const Node& node) {
            share_payload(owner.tree, node.kind, slots_of(outer.tree, node));
            build.close(node.kind, node.arity);
        });
    return new_spec(state_of(outer), outer.none_is_leaf, name, owner);
}

Ref spec_broadcast(const SpecObject& a, const SpecObject& b) {
    require_same_none(a, b);
    PyObject* name = merged_namespace(a, b);
    TreeOwner owner;
    Broadcaster(a, b, owner.tree).merge();
    return new_spec(state_of(a), a.none_is_leaf, name, owner);
}

Ref spec_children(const SpecObject& spec) {
    ObjectStack children;
    if (spec.tree.nodes.empty()) return children.into_list();
    Stack<Subtree, 8> parts;
    children_of(spec.tree, whole(spec.tree), parts);
    for (const Subtree& part : parts) children.push_owned(spec_of_subtree(spec, part).release());
    return children.into_list();
}

Ref spec_child(const SpecObject& spec, Py_ssize_t index) {
    const auto arity = static_cast<Py_ssize_t>(spec.tree.num_children());
    if (index < -arity || index >= arity) {
        raise(PyExc_IndexError, "PyTreeSpec::Child() index out of range.");
    }
    Stack<Subtree, 8> parts;
    children_of(spec.tree, whole(spec.tree), parts);
    return spec_of_subtree(spec,
                           parts[static_cast<std::size_t>(index < 0 ? index + arity : index)]);
}

Ref spec_one_level(const SpecObject& spec) {
    if (spec.tree.is_leaf()) return Ref::borrow(Py_None);
    return spec_of_node(spec, spec.tree.root());
}

}  // namespace optree
