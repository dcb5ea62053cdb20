// SPDX-License-Identifier: Apache-2.0
// leaves + structure -> tree.
#pragma once

#include <type_traits>

#include "walk/flatten.h"

namespace optree {

// Postpones collections while many containers are created. Python code in between suspends this.
class Pause {
  public:
    Pause(CollectorPause& pause, std::size_t nodes) noexcept
        : pause_(pause), wanted_(nodes >= kManyNodes && CollectorPause::has_effect()) {
        if (wanted_) CollectorPause::let_start();
    }
    Pause(const Pause&) = delete;
    Pause& operator=(const Pause&) = delete;
    ~Pause() {
        if (wanted_) pause_.end();
    }
    OPTREE_INLINE void go_on() const noexcept {
        if (wanted_) pause_.begin();
    }

  private:
    static constexpr std::size_t kManyNodes = 64;
    CollectorPause& pause_;
    bool wanted_;
};

// Rows with at least this many leaves bypass the stack if possible. This saves an eighth of
// unflatten on a list of 10,000 (benchmarks/optree).
inline constexpr std::uint32_t kLongRow = 64;

// Rebuilds a tree from a source of leaves: `source.take(count, stack)` pushes new references to the
// next leaves in order. A source that owns contiguous leaves (kOwnsRow) may hand them to a
// container directly: `source.row()`, then `source.given(count)`. A source that lends a row
// (kLendsRow) may create a container from it: `source.copy(kind, count)`, which returns null if it
// cannot. Containers are created in post-order, each as soon as its children exist.
template <class Source>
Ref unflatten(State& state, const TreeView& tree, Source&& source) {
    ObjectStack stack(state.blocks, BlockPool::stack);
    const Pause pause(state.collector_pause, tree.num_nodes);
    const TupleClasses::Stretch quiet(state.tuples, true);
    std::uint32_t taken = 0;
    for (std::size_t i = 0; i < tree.num_nodes; ++i) {
        const Node& node = tree.nodes[i];
        const Slot* slots = tree.slots + node.payload;
        const std::uint32_t fresh = node.leaf_end - taken;
        taken = node.leaf_end;
        if constexpr (std::decay_t<Source>::kLendsRow) {
            if (OPTREE_UNLIKELY(fresh >= kLongRow && fresh == node.arity)) {
                if (PyObject* made = source.copy(node.kind, fresh)) {
                    stack.push_owned(made);
                    continue;
                }
            }
        }
        const bool in_row = std::decay_t<Source>::kOwnsRow && fresh == node.arity;
        if (!in_row && fresh != 0) source.take(fresh, stack);
        pause.go_on();
        const std::size_t base = stack.size() - (in_row ? 0 : node.arity);
        PyObject** children = in_row ? source.row() : stack.data() + base;
        PyObject* made = rebuild(state, node.kind, slots, children, node.arity);
        if (in_row) source.given(fresh);
        stack.forget_from(base);
        if (OPTREE_UNLIKELY(made == nullptr)) throw PythonError{};
        stack.push_owned(made);
    }
    if (tree.num_nodes == 0) source.take(tree.leaves, stack);
    return Ref::steal(stack.pop());
}

// Rebuilds a tree from an iterable with exactly the right number of leaves, which the caller keeps
// alive. Raises ValueError for any other number.
Ref unflatten_iterable(State& state, const TreeView& tree, PyObject* leaves);

// Leaves read one at a time from an iterator, counted for the error messages.
class IteratorSource {
  public:
    static constexpr bool kOwnsRow = false;
    static constexpr bool kLendsRow = false;
    IteratorSource(State& state, PyObject* iterator, std::uint32_t expected, bool counts_in_message)
        : state_(state), iterator_(iterator), expected_(expected), counts_(counts_in_message) {}
    void take(std::uint32_t count, ObjectStack& stack);
    Ref next();
    // Raises if the iterator yields more.
    void finish();
    PyObject** row() noexcept { return nullptr; }
    void given(std::uint32_t) noexcept {}

  private:
    State& state_;
    PyObject* iterator_;
    std::uint32_t expected_;
    std::uint32_t got_ = 0;
    bool counts_;
};

}  // namespace optree
