// SPDX-License-Identifier: Apache-2.0
// leaves + structure -> tree.
#pragma once

#include <type_traits>

#include "walk/flatten.h"

namespace optree {

// Rebuilds a tree from a source of leaves: `source.take(count, stack)` pushes the next leaves (new
// references) in order. A source that owns its leaves in a row (kOwnsRow) may give them to a container
// as they stand: `source.row()`, then `source.given(count)`. One that runs Python code to get them says
// so (kRunsCode). Containers are made in post-order, each as
// soon as its children are there.
template <class Source>
Ref unflatten(State& state, const TreeView& tree, Source&& source) {
    ObjectStack stack(state.blocks, BlockPool::stack);
    TupleClasses::Stretch stretch(state.tuples);
    std::uint32_t taken = 0;
    for (std::size_t i = 0; i < tree.num_nodes; ++i) {
        const Node& node = tree.nodes[i];
        const Slot* slots = tree.slots + node.payload;
        const std::uint32_t fresh = node.leaf_end - taken;
        taken = node.leaf_end;
        PyObject* made;
        if (std::decay_t<Source>::kOwnsRow && fresh == node.arity) {
            made = rebuild(state, node.kind, slots, source.row(), fresh);
            source.given(fresh);
        } else {
            if (fresh != 0) source.take(fresh, stack);
            if constexpr (std::decay_t<Source>::kRunsCode) stretch.python_code_ran();
            const std::size_t base = stack.size() - node.arity;
            made = rebuild(state, node.kind, slots, stack.data() + base, node.arity);
            stack.forget_from(base);
        }
        if (stretch.trusts() && !rebuilds_quietly(node.kind)) stretch.python_code_ran();
        if (OPTREE_UNLIKELY(made == nullptr)) throw PythonError{};
        stack.push_owned(made);
    }
    if (tree.num_nodes == 0) source.take(tree.leaves, stack);
    return Ref::steal(stack.pop());
}

// Rebuilds a tree from any iterable of exactly as many leaves, or raises ValueError.
Ref unflatten_iterable(State& state, const TreeView& tree, PyObject* leaves);

// Leaves pulled one at a time from an iterator; counts them for the error messages.
class IteratorSource {
  public:
    static constexpr bool kOwnsRow = false;
    static constexpr bool kRunsCode = true;
    IteratorSource(PyObject* iterator, std::uint32_t expected, bool counts_in_message)
        : iterator_(iterator), expected_(expected), counts_(counts_in_message) {}
    void take(std::uint32_t count, ObjectStack& stack);
    Ref next();
    // Raises if the iterator has more.
    void finish();
    PyObject** row() noexcept { return nullptr; }
    void given(std::uint32_t) noexcept {}

  private:
    PyObject* iterator_;
    std::uint32_t expected_;
    std::uint32_t got_ = 0;
    bool counts_;
};

}  // namespace optree
