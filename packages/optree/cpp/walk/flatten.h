// SPDX-License-Identifier: Apache-2.0
// tree -> leaves + structure, in one pass.
#pragma once

#include "walk/spec_object.h"

namespace optree {

// The structure of a tree as borrowed ranges, so that scratch tables and specs can be read in the
// same way.
struct TreeView {
    const Node* nodes;
    std::size_t num_nodes;
    const Slot* slots;
    std::uint32_t leaves;
};

inline TreeView view_of(const Tree& tree) noexcept {
    return {tree.nodes.data(), tree.nodes.size(), tree.slots.data(), tree.leaves};
}

// Collects leaves and structure in buffers that start on the C stack. For small trees nothing is
// allocated per node or leaf. The object owns its content until it is taken out.
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
        for (Slot slot : slots_) drop_slot(slot);
    }

    // With `keep_leaves` false, the leaves are counted but not kept.
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
    // Uses one C frame for each level of the tree, as small as its kind of node allows.
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
    // Adds objects until one is not of the class of the last leaf. Returns the number added.
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
    // The same for objects that are already written after the leaves.
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
    // The position at which a node began.
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
    std::size_t count_ = 0;  // number of leaves so far
    static constexpr int kDepthStep = 50;
    int max_depth_ = kDepthStep;  // depth for which the stack was checked
    const char* root_frame_ = nullptr;
    bool found_custom_ = false;
    Scratch<Node, 48> nodes_;
    Scratch<Slot, 48> slots_;
    ObjectStack pending_;  // children of mappings and custom nodes on the path from the root
};

// The leaves and structure of a tree as (list, spec), or one of them.
Ref flatten_to_pair(Context& context, PyObject* tree);
Ref flatten_to_leaves(Context& context, PyObject* tree);
Ref flatten_to_spec(Context& context, PyObject* tree);

}  // namespace optree
