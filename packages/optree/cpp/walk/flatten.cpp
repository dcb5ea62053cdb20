// SPDX-License-Identifier: Apache-2.0
#include "walk/flatten.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "nodes/look_ahead.h"
#include "support/stack.h"

namespace optree {

// Assumes that the next levels need as much stack as the levels so far.
void Flattening::go_deeper(int depth) {
    if (depth >= compat::kMaxDepth) {
        raise(PyExc_RecursionError, "Maximum recursion depth exceeded during flattening the tree.");
    }
    const auto used = static_cast<std::size_t>(std::abs(root_frame_ - frame_address()));
    const std::size_t step = used / static_cast<unsigned>(depth) * kDepthStep;
    if (stack_left() < step + compat::kStackOfPython) {
        raise(
            PyExc_RecursionError,
            "Maximum recursion depth exceeded during flattening the tree. The stack of this thread "
            "has room for %d levels; threading.stack_size() sets the size for new threads.",
            depth);
    }
    max_depth_ = std::min(depth + kDepthStep, compat::kMaxDepth);
}

// The slots of the node must already be pushed. The node is written in place, one field after the
// other. A node assembled on the stack was copied by loads wider than the stores before them, which
// stall the processor (a tenth of flatten on module trees, benchmarks/optree).
OPTREE_INLINE void Flattening::close(Kind kind, std::uint32_t arity, Start start,
                                     std::size_t slots) {
    nodes_.reserve(1);
    Node& node = *nodes_.end();
    node.kind = kind;
    node.payload = static_cast<std::uint32_t>(slots_.size() - slots);
    node.arity = arity;
    node.leaves = static_cast<std::uint32_t>(count_ - start.leaf);
    node.span = static_cast<std::uint32_t>(nodes_.size() - start.node + 1);
    node.leaf_end = static_cast<std::uint32_t>(count_);
    nodes_.set_size(nodes_.size() + 1);
}

template <bool kPredicate, bool kKeep>
OPTREE_INLINE void Flattening::visit(PyObject* object, int depth) {
    if constexpr (kPredicate) {
        if (context_.is_leaf_by_predicate(object)) return add_leaf<kKeep>(object);
    }
    Registration* registration = nullptr;
    const Kind kind = context_.classify(object, registration);
    if (OPTREE_LIKELY(is_leaf(kind))) return add_leaf<kKeep>(object);
    descend<kPredicate, kKeep>(kind, registration, object, depth);
}

template <bool kPredicate, bool kKeep>
OPTREE_INLINE void Flattening::visit_owned_children(std::size_t base, int depth) {
    // The references in pending_ from `base` on are moved to the leaves or dropped one by one.
    const std::size_t end = pending_.size();
    for (std::size_t i = base; i < end; ++i) {
        PyObject* child = pending_[i];
        Registration* registration = nullptr;
        const bool stop = kPredicate && context_.is_leaf_by_predicate(child);
        const Kind kind = stop ? kLeafKind : context_.classify(child, registration);
        if (OPTREE_LIKELY(is_leaf(kind))) {
            pending_[i] = nullptr;
            ++count_;
            if constexpr (kKeep) {
                leaves.push_owned(child);
                continue;
            }
        } else {
            descend<kPredicate, kKeep>(kind, registration, child, depth);
            pending_[i] = nullptr;
        }
        drop(child);
    }
    pending_.forget_from(base);
}

// The visitor for one level of the tree. It visits nodes at once if the object keeps them alive.
template <bool kPredicate, bool kKeep>
class Flattening::Level {
  public:
    static constexpr bool kAsksEmpty = true;
    // Empty: other threads may change the object during the visit.
    struct Section {
        explicit Section(PyObject*) noexcept {}
    };
    OPTREE_INLINE Level(Flattening& flat, int depth) : flat_(flat), depth_(depth) {}

    OPTREE_INLINE void expect(std::size_t arity) { flat_.check_depth(depth_, arity); }
    OPTREE_INLINE void borrowed(PyObject* child) {
        flat_.visit<kPredicate, kKeep>(child, depth_ + 1);
    }
    OPTREE_INLINE std::size_t at_once(PyObject* const* children, std::size_t count) {
        if (kPredicate || !flat_.context_.is_leaf_for_sure(children[0])) return 0;
        return flat_.add_leaves_alike<kKeep>(children, count);
    }
    // Finding the kind may run Python code too (a metaclass), so the reference is owned.
    OPTREE_INLINE void owned(Ref child) {
        if constexpr (kPredicate) return borrowed(child.get());
        Registration* found = nullptr;
        const Kind kind = flat_.context_.classify(child.get(), found);
        if (OPTREE_LIKELY(is_leaf(kind))) {
            if constexpr (kKeep) flat_.leaves.push_owned(child.release());
            ++flat_.count_;
        } else {
            flat_.descend<kPredicate, kKeep>(kind, found, child.get(), depth_ + 1);
        }
    }
    // The room after the leaves: the first values are often leaves, which are then already in
    // place.
    OPTREE_INLINE PyObject** room(std::size_t count) { return flat_.leaves.room(count); }
    OPTREE_INLINE void put(PyObject* const* children, std::size_t count) {
        std::size_t leaves = 0;
        if (!kPredicate && flat_.context_.is_leaf_for_sure(children[0])) {
            leaves = flat_.add_leaves_in_place<kKeep>(children, count);
        }
        if (leaves == count) return;
        take_references(children + leaves, flat_.pending_.room(count - leaves), count - leaves);
        flat_.pending_.adopt(count - leaves);
    }
    OPTREE_INLINE ObjectStack& stack() noexcept { return flat_.pending_; }

  private:
    Flattening& flat_;
    int depth_;
};

template <class Node, bool kPredicate, bool kKeep>
OPTREE_NOINLINE void Flattening::descend_as(Registration* registration, PyObject* object,
                                            int depth) {
    constexpr Kind kind = kKindOf<Node>;
    constexpr std::size_t slots = slot_count(kind);
    const Start begin = start();
    const std::size_t base = pending_.size();
    Ref slot[slots != 0 ? slots : 1];
    if constexpr (is_custom(kind)) {
        slot[0] = Ref::borrow(reinterpret_cast<PyObject*>(registration));
        found_custom_ = true;
    }
    Level<kPredicate, kKeep> level(*this, depth);
    const std::uint32_t arity = Node::visit(context_, object, level, slot);
    if constexpr (Node::kStacksChildren) {
        if (pending_.size() != base) {
            if constexpr (!is_mapping(kind)) check_depth(depth, arity);  // `expect` was not called
            visit_owned_children<kPredicate, kKeep>(base, depth + 1);
        }
    }
    for (std::size_t i = 0; i < slots; ++i) {
        slots_.push(slot[i].get());
        (void)slot[i].release();
    }
    close(kind, arity, begin, slots);
}

// Empty containers need no frame. They are an eighth of the nodes in the module tree of ResNet50.
OPTREE_NOINLINE void Flattening::add_empty(Kind kind) {
    if (is_mapping(kind)) slots_.push(compat::new_ref(context_.state.layouts().empty.get()));
    close(kind, 0, start(), is_mapping(kind) ? 1 : 0);
}

template <bool kPredicate, bool kKeep>
OPTREE_INLINE void Flattening::descend(Kind kind, Registration* registration, PyObject* object,
                                       int depth) {
    dispatch(kind, [&](auto node) OPTREE_INLINE_LAMBDA {
        using Node = decltype(node);
        if constexpr (are_alike_if_empty(kKindOf<Node>)) {
            if (Node::is_empty(context_.state, object)) return add_empty(kKindOf<Node>);
        }
        descend_as<Node, kPredicate, kKeep>(registration, object, depth);
    });
}

void Flattening::run(PyObject* tree, bool keep_leaves) {
    const Ref alive = Ref::borrow(tree);
    root_frame_ = frame_address();
    if (context_.predicate != nullptr) {
        keep_leaves ? visit<true, true>(tree, 0) : visit<true, false>(tree, 0);
    } else {
        keep_leaves ? visit<false, true>(tree, 0) : visit<false, false>(tree, 0);
    }
    checked_count(count_);
    checked_count(nodes_.size());
    checked_count(slots_.size());
}

Ref Flattening::take_spec() {
    Ref self =
        new_spec(context_.state, context_.none_is_leaf, context_.spec_namespace(found_custom_));
    Tree& tree = as_spec(self.get()).tree;
    // All memory is allocated first, so that a spec owns all of its slots or none.
    tree.slots.reserve(slots_.size());
    tree.nodes.resize(nodes_.size());
    tree.slots.resize(slots_.size());
    std::memcpy(static_cast<void*>(tree.nodes.data()), nodes_.data(), nodes_.size() * sizeof(Node));
    std::memcpy(static_cast<void*>(tree.slots.data()), slots_.data(), slots_.size() * sizeof(Slot));
    tree.leaves = static_cast<std::uint32_t>(count_);
    slots_.set_size(0);  // now owned by the spec
    return self;
}

Ref flatten_to_pair(Context& context, PyObject* tree) {
    Flattening flat(context);
    flat.run(tree);
    Ref spec = flat.take_spec();
    Ref leaves = flat.leaves.into_list();
    Ref pair = checked(PyTuple_New(2));
    PyTuple_SET_ITEM(pair.get(), 0, leaves.release());
    PyTuple_SET_ITEM(pair.get(), 1, spec.release());
    return pair;
}

Ref flatten_to_leaves(Context& context, PyObject* tree) {
    Flattening flat(context);
    flat.run(tree);
    return flat.leaves.into_list();
}

Ref flatten_to_spec(Context& context, PyObject* tree) {
    Flattening flat(context);
    flat.run(tree, false);
    return flat.take_spec();
}

}  // namespace optree
