// SPDX-License-Identifier: Apache-2.0
#include "walk/paths.h"

#include <vector>

namespace optree {
namespace {

// Makes the path entry objects that accessors consist of.
class EntryMaker {
  public:
    explicit EntryMaker(State& state) : state_(state) {}

    Ref make(Kind kind, const Slot* slots, std::uint32_t index) {
        const Ref entry = node_entry(kind, slots, index);
        PyObject* args[] = {nullptr, entry.get(), node_type(state_, kind, slots),
                            state_.kinds[static_cast<int>(kind)]};
        return checked(PyObject_Vectorcall(entry_class(kind, slots), args + 1,
                                           3 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    }

  private:
    PyObject* entry_class(Kind kind, const Slot* slots) {
        if (kind == Kind::custom) return as_registration(slots[0])->path_entry_type;
        if (is_mapping(kind)) return named(mapping_, "MappingEntry");
        if (kind == Kind::namedtuple) return named(namedtuple_, "NamedTupleEntry");
        if (kind == Kind::structseq) return named(structseq_, "StructSequenceEntry");
        return named(sequence_, "SequenceEntry");
    }
    PyObject* named(Ref& cached, const char* name) {
        if (!cached) cached = state_.accessor_class(name);
        return cached.get();
    }

    State& state_;
    Ref mapping_, namedtuple_, structseq_, sequence_;
};

// One level of the walk from the root down to a leaf.
struct Frame {
    const Node* node;
    std::uint32_t child;  // the child being visited
    Stack<Subtree, 8> children;
};

// Visits the leaves in order with the stack of entries that leads to each.
//   make(kind, slots, i) gives the object for one edge; leaf(edges) is called once a leaf.
template <class Make, class Leaf>
void walk_edges(const Tree& tree, Make&& make, Leaf&& leaf) {
    ObjectStack edges;
    if (tree.nodes.empty()) return leaf(edges);
    std::vector<Frame> frames;
    const auto enter = [&](const Subtree& part) {
        if (frames.size() > static_cast<std::size_t>(compat::kMaxDepth)) {
            raise(PyExc_RecursionError,
                  "Maximum recursion depth exceeded during walking the tree.");
        }
        Frame& frame = frames.emplace_back();
        frame.node = &part.root(tree);
        frame.child = 0;
        children_of(tree, part, frame.children);
    };
    enter(whole(tree));
    while (!frames.empty()) {
        Frame& frame = frames.back();
        if (frame.child == frame.node->arity) {
            frames.pop_back();
            if (!frames.empty()) edges.drop_from(edges.size() - 1);
            continue;
        }
        const std::uint32_t index = frame.child++;
        const Subtree part = frame.children[index];
        if (part.leaves == 0) continue;  // leads to no leaf
        edges.push_owned(make(frame.node->kind, slots_of(tree, *frame.node), index).release());
        if (part.is_leaf()) {
            if (frames.size() > static_cast<std::size_t>(compat::kMaxDepth)) {
                raise(PyExc_RecursionError,
                      "Maximum recursion depth exceeded during walking the tree.");
            }
            leaf(edges);
            edges.drop_from(edges.size() - 1);
        } else {
            enter(part);
        }
    }
}

Ref tuple_of(ObjectStack& edges) {
    Ref path = checked(PyTuple_New(static_cast<Py_ssize_t>(edges.size())));
    for (std::size_t i = 0; i < edges.size(); ++i) {
        PyTuple_SET_ITEM(path.get(), static_cast<Py_ssize_t>(i), compat::new_ref(edges[i]));
    }
    return path;
}

}  // namespace

Ref spec_paths(const SpecObject& spec) {
    ObjectStack paths;
    paths.reserve(spec.tree.leaves);
    walk_edges(
        spec.tree,
        [](Kind kind, const Slot* slots, std::uint32_t i) { return node_entry(kind, slots, i); },
        [&](ObjectStack& edges) { paths.push_owned(tuple_of(edges).release()); });
    return paths.into_list();
}

Ref spec_accessors(const SpecObject& spec) {
    State& state = state_of(spec);
    EntryMaker maker(state);
    const Ref accessor = state.accessor_class("PyTreeAccessor");
    ObjectStack accessors;
    accessors.reserve(spec.tree.leaves);
    walk_edges(
        spec.tree,
        [&](Kind kind, const Slot* slots, std::uint32_t i) { return maker.make(kind, slots, i); },
        [&](ObjectStack& edges) {
            const Ref path = tuple_of(edges);
            accessors.push_owned(
                checked(PyObject_CallOneArg(accessor.get(), path.get())).release());
        });
    return accessors.into_list();
}

Ref spec_entry(const SpecObject& spec, Py_ssize_t index) {
    const auto arity = static_cast<Py_ssize_t>(spec.tree.num_children());
    if (index < -arity || index >= arity) {
        raise(PyExc_IndexError, "PyTreeSpec::Entry() index out of range.");
    }
    const Node& root = spec.tree.root();
    return node_entry(root.kind, slots_of(spec.tree, root),
                      static_cast<std::uint32_t>(index < 0 ? index + arity : index));
}

Ref spec_entries(const SpecObject& spec) {
    ObjectStack entries;
    const auto arity = static_cast<Py_ssize_t>(spec.tree.num_children());
    for (Py_ssize_t i = 0; i < arity; ++i) entries.push_owned(spec_entry(spec, i).release());
    return entries.into_list();
}

}  // namespace optree
