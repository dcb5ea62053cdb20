// SPDX-License-Identifier: Apache-2.0
#include "walk/pickle.h"

#include <array>
#include <map>
#include <unordered_map>

#include "walk/compare.h"

namespace optree {
namespace {

PyObject* or_none(const Ref& ref) noexcept { return ref ? ref.get() : Py_None; }

Ref node_state(Kind kind, std::uint32_t arity, const Slot* slots, std::size_t leaves,
               std::size_t nodes, bool for_pickle) {
    WrittenNode written{nullptr, nullptr, nullptr, nullptr, for_pickle};
    if (!is_leaf(kind)) dispatch_slots(kind, [&](auto list) { list.write(slots, written); });
    return checked(Py_BuildValue("(iIOOOnnO)", static_cast<int>(kind),
                                 static_cast<unsigned int>(arity), or_none(written.data),
                                 or_none(written.entries), or_none(written.type),
                                 static_cast<Py_ssize_t>(leaves), static_cast<Py_ssize_t>(nodes),
                                 or_none(written.original)));
}

// The parts of the state of a node.
struct NodeKey {
    NodeKey(const Node& node, const Slot* slots)
        : parts{
              static_cast<std::uint64_t>(node.kind), node.arity, node.leaves, node.span, 0, 0, 0} {
        for (std::size_t i = 0; i < slot_count(node.kind); ++i) {
            parts[4 + i] = reinterpret_cast<std::uintptr_t>(slots[i]);
        }
    }
    friend bool operator<(const NodeKey& a, const NodeKey& b) { return a.parts < b.parts; }
    std::array<std::uint64_t, 7> parts;
};

// Reads the node states into a tree.
class Reader {
  public:
    Reader(State& state, bool none_is_leaf, PyObject* name, Tree& out)
        : state_(state), none_is_leaf_(none_is_leaf), name_(name), out_(out), build_(out) {}

    void node(PyObject* fields) {
        if (fields == leaf_) return build_.leaf();
        const auto known = known_.find(fields);
        if (known != known_.end()) return again(out_.nodes[known->second]);
        const std::size_t before = out_.nodes.size();
        first(fields);
        if (out_.nodes.size() == before) {
            leaf_ = fields;
        } else {
            known_.emplace(fields, static_cast<std::uint32_t>(before));
        }
    }

    void finish() const {
        if (build_.open() != 1) malformed("the nodes do not form exactly one tree");
    }

  private:
    // A node that shares its state object with an earlier node, since pickle preserves identity.
    void again(const Node& node) {
        const Node like = node;  // the table may be reallocated
        if (like.arity > build_.open()) {
            malformed("a node has more children than there are nodes before it");
        }
        Ref slots[3];
        const std::size_t count = slot_count(like.kind);
        for (std::size_t i = 0; i < count; ++i) {
            slots[i] = Ref::borrow(as_object(out_.slots[like.payload + i]));
        }
        for (std::size_t i = 0; i < count; ++i) out_.slots.push_back(slots[i].release());
        build_.close(like.kind, like.arity);
        require_counts(like.leaves, std::size_t{like.span} + like.leaves);
    }

    void require_counts(std::size_t leaves, std::size_t nodes) const {
        if (build_.last_leaves() != leaves ||
            std::size_t{build_.last_leaves()} + build_.last_span() != nodes) {
            malformed("the counts of a node do not match its children");
        }
    }

    void first(PyObject* fields) {
        if (!PyTuple_Check(fields)) malformed("a node state is not a tuple");
        const Py_ssize_t size = PyTuple_GET_SIZE(fields);
        if (size != 7 && size != 8) malformed("a node state has %zd items, not 7 or 8", size);
        const auto at = [fields](Py_ssize_t i) { return PyTuple_GET_ITEM(fields, i); };
        const Py_ssize_t number = read_integer(at(0), "the kind of a node");
        if (number < 0 || number >= kNumKinds) malformed("the kind of a node is out of range");
        const auto kind = static_cast<Kind>(number);
        if (!is_leaf(kind) && !is_available(state_, kind)) {
            const char* name = facts_of(kind).name;
            raise(PyExc_ValueError,
                  "Cannot restore a PyTreeSpec containing a `%s` node: this build of optree was "
                  "compiled without `%s` support (requires Python 3.15+).",
                  name, name);
        }
        const Py_ssize_t arity = read_integer(at(1), "the arity of a node");
        if (arity < 0) malformed("the arity of a node is negative");
        checked_count(static_cast<std::size_t>(arity));
        const Py_ssize_t leaves = read_integer(at(5), "the number of leaves of a node");
        const Py_ssize_t nodes = read_integer(at(6), "the number of nodes of a node");
        if (leaves < 0 || nodes < 1) malformed("the counts of a node are out of range");
        PyObject* original = size == 8 ? at(7) : nullptr;
        if (original != nullptr && (original != Py_None) != facts_of(kind).follows_dict_mode) {
            malformed("the original keys are present for the wrong kind of node");
        }
        if (!is_custom(kind)) {
            require_none(at(3), "a node that is not custom has entries");
            require_none(at(4), "a node that is not custom has a custom type");
        }
        add(kind, arity, at(2), at(3), at(4), original);
        require_counts(static_cast<std::size_t>(leaves), static_cast<std::size_t>(nodes));
    }

    void add(Kind kind, Py_ssize_t arity, PyObject* data, PyObject* entries, PyObject* type,
             PyObject* original) {
        if (is_leaf(kind)) {
            require_none(data, "a leaf has node data");
            if (arity != 0) malformed("a leaf has children");
            return build_.leaf();
        }
        if (static_cast<std::size_t>(arity) > build_.open()) {
            malformed("a node has more children than there are nodes before it");
        }
        ReadNode node{state_, name_,   none_is_leaf_, kind_name(kind), arity,
                      data,   entries, type,          original,        nullptr};
        Payload payload;
        dispatch(kind, [&](auto of_kind) {
            using Node = decltype(of_kind);
            if (slot_count(kind) == 0 && data != Py_None) {
                malformed("a %s node has node data", Node::kName);
            }
            SlotsOf<Node>::read(node, payload.slot);
            Node::verify(node, payload.slot);
        });
        push_payload(out_, kind, payload);
        build_.close(kind, static_cast<std::uint32_t>(arity));
    }

    State& state_;
    bool none_is_leaf_;
    PyObject* name_;
    Tree& out_;
    Builder build_;
    PyObject* leaf_ = nullptr;                            // the most recent state of a leaf
    std::unordered_map<PyObject*, std::uint32_t> known_;  // state -> the node it was read into
};

}  // namespace

Ref spec_getstate(const SpecObject& spec, bool for_pickle) {
    // Collected outside a tuple: hashing keys may run Python code, which must not see a partly
    // filled tuple.
    ObjectStack states;
    states.reserve(static_cast<std::size_t>(spec.tree.num_nodes()));
    // Nodes with equal states share one object, which pickle writes once. Makes dumping and loading
    // 3x to 10x faster (benchmarks/optree).
    const Ref leaf = node_state(kLeafKind, 0, nullptr, 1, 1, for_pickle);
    std::map<NodeKey, PyObject*> known;
    const auto add = [&](const Node& node) {
        const Slot* slots = slots_of(spec.tree, node);
        PyObject*& state = known[NodeKey(node, slots)];
        if (state != nullptr) return states.push(state);
        state = node_state(node.kind, node.arity, slots, node.leaves,
                           std::size_t{node.span} + node.leaves, for_pickle)
                    .release();
        states.push_owned(state);  // keeps it alive for `known`
    };
    visit_tokens(spec.tree, [&] { states.push(leaf.get()); }, add);
    const Ref nodes = states.into_tuple();
    return checked(
        Py_BuildValue("(OOO)", nodes.get(), spec.none_is_leaf ? Py_True : Py_False, spec.name));
}

Ref spec_reduce(PyObject* self, bool for_pickle) {
    const SpecObject& spec = as_spec(self);
    const Ref state = spec_getstate(spec, for_pickle);
    // Py_BuildValue would expose the outer tuple to the collector while it creates the inner one.
    const Ref arguments = checked(PyTuple_Pack(1, Py_TYPE(self)));
    return checked(
        PyTuple_Pack(3, state_of(spec).copyreg_newobj.get(), arguments.get(), state.get()));
}

void spec_setstate(SpecObject& spec, PyObject* state) {
    if (!PyTuple_Check(state) || PyTuple_GET_SIZE(state) != 3)
        malformed("the state is not a 3-tuple");
    const Ref alive = Ref::borrow(state);
    PyObject* nodes = PyTuple_GET_ITEM(state, 0);
    PyObject* none_is_leaf = PyTuple_GET_ITEM(state, 1);
    PyObject* name = PyTuple_GET_ITEM(state, 2);
    if (!PyTuple_Check(nodes)) malformed("the node states are not a tuple");
    if (!PyBool_Check(none_is_leaf)) malformed("none_is_leaf is not a bool");
    if (!PyUnicode_CheckExact(name)) malformed("the namespace is not a str");
    TreeOwner owner;
    Reader reader(state_of(spec), none_is_leaf == Py_True, name, owner.tree);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(nodes); ++i)
        reader.node(PyTuple_GET_ITEM(nodes, i));
    reader.finish();
    if (is_initialised(spec)) {
        // A spec is immutable once it has a state: other code may be walking over this one.
        const Ref other = new_spec(state_of(spec), none_is_leaf == Py_True, name, owner);
        if (spec_equal(spec, as_spec(other.get()))) return;
        raise(PyExc_RuntimeError,
              "Malformed pickled PyTreeSpec: the PyTreeSpec already has another state.");
    }
    const CriticalSection writing(reinterpret_cast<PyObject*>(&spec));
    if (is_initialised(spec)) {
        raise(PyExc_RuntimeError,
              "Malformed pickled PyTreeSpec: the PyTreeSpec already has another state.");
    }
    spec.tree.nodes = std::move(owner.tree.nodes);
    spec.tree.slots = std::move(owner.tree.slots);
    spec.tree.leaves = owner.tree.leaves;
    owner.tree.slots.clear();
    spec.none_is_leaf = none_is_leaf == Py_True;
    PyObject* old = spec.name;
    spec.name = compat::new_ref(name);
    Py_DECREF(old);
}

}  // namespace optree
