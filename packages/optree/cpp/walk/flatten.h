// SPDX-License-Identifier: Apache-2.0
// tree -> leaves + structure, in one pass.
#pragma once

#include "walk/spec_object.h"

namespace optree {

// The structure of a tree as borrowed ranges, so that a scratch and a spec read alike.
struct TreeView {
    const Node* nodes;
    std::size_t num_nodes;
    const Slot* slots;
    std::uint32_t leaves;
};

inline TreeView view_of(const Tree& tree) noexcept {
    return {tree.nodes.data(), tree.nodes.size(), tree.slots.data(), tree.leaves};
}

// Collects leaves and structure in buffers that start on the C stack; nothing is allocated per node
// or leaf for small trees. What is collected is owned until it is taken out.
class Flattening {
  public:
    explicit Flattening(Context& context)
        : leaves(context.state.blocks, BlockPool::leaves),
          context_(context),
          nodes_(context.state.blocks, BlockPool::nodes),
          slots_(context.state.blocks, BlockPool::slots),
          pending_(context.state.blocks, BlockPool::pending) {}
    Flattening(const Flattening&) = delete;
    Flattening& operator=(const Flattening&) = delete;
    ~Flattening() {
        for (Slot slot : slots_) Py_XDECREF(as_object(slot));
    }

    // `keep_leaves` false: the leaves are counted, not kept.
    void run(PyObject* tree, bool keep_leaves = true);

    ObjectStack leaves;
    TreeView view() const noexcept {
        return {nodes_.data(), nodes_.size(), slots_.data(), static_cast<std::uint32_t>(count_)};
    }
    // Moves the structure into a new spec.
    Ref take_spec();

  private:
    template <bool kPredicate, bool kKeep>
    class Level;
    template <bool kPredicate, bool kKeep>
    void visit(PyObject* object, int depth);
    // One C frame a level of the tree, each as small as its kind of node allows.
    template <bool kPredicate, bool kKeep>
    void descend(Kind kind, Registration* registration, PyObject* object, int depth);
    void add_empty(Kind kind);
    template <class Node, bool kPredicate, bool kKeep>
    void descend_as(Registration* registration, PyObject* object, int depth);
    template <bool kPredicate, bool kKeep>
    void visit_owned_children(std::size_t base, int depth);
    template <bool kKeep>
    void add_leaf(PyObject* object) {
        if constexpr (kKeep) leaves.push(object);
        ++count_;
    }
    // Adds objects as long as they are of the class of the last leaf; returns how many.
    template <bool kKeep>
    OPTREE_INLINE std::size_t add_leaves_alike(PyObject* const* objects, std::size_t count) {
        const auto is_leaf = [last = context_.last_leaf()](PyObject* object) {
            return Py_TYPE(object) == last;
        };
        std::size_t added = 0;
        if constexpr (kKeep) {
            added = leaves.push_while(objects, count, is_leaf);
        } else {
            while (added < count && is_leaf(objects[added])) ++added;
        }
        count_ += added;
        return added;
    }
    // The same for objects that are written behind the leaves.
    template <bool kKeep>
    OPTREE_INLINE std::size_t add_leaves_in_place(PyObject* const* objects, std::size_t count) {
        const PyTypeObject* last = context_.last_leaf();
        std::size_t added = 0;
        for (; added < count && Py_TYPE(objects[added]) == last; ++added) {
            if constexpr (kKeep) Py_INCREF(objects[added]);
        }
        if constexpr (kKeep) leaves.adopt(added);
        count_ += added;
        return added;
    }
    // Where a node began.
    struct Start {
        std::size_t leaf, node;
    };
    Start start() const noexcept { return {count_, nodes_.size()}; }
    OPTREE_INLINE void check_depth(int depth, std::size_t arity) {
        if (OPTREE_UNLIKELY(depth >= max_depth_ && arity != 0)) go_deeper(depth);
    }
    OPTREE_COLD void go_deeper(int depth);
    void close(Kind kind, std::uint32_t arity, Start start, std::size_t slots);

    Context& context_;
    std::size_t count_ = 0;  // leaves so far
    static constexpr int kDepthStep = 50;
    int max_depth_ = kDepthStep;  // as far as the stack was looked at
    const char* root_frame_ = nullptr;
    bool found_custom_ = false;
    Scratch<Node, 48> nodes_;
    Scratch<Slot, 48> slots_;
    ObjectStack pending_;  // children of mappings and custom nodes on the way to the root
};

// Leaves and structure of a tree as (list, spec), or one of them.
Ref flatten_to_pair(Context& context, PyObject* tree);
Ref flatten_to_leaves(Context& context, PyObject* tree);
Ref flatten_to_spec(Context& context, PyObject* tree);

}  // namespace optree
