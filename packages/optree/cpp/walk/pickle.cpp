// SPDX-License-Identifier: Apache-2.0
#include "walk/pickle.h"

#include <array>
#include <cstdarg>
#include <map>
#include <unordered_map>

#include "walk/compare.h"

namespace optree {
namespace {

Ref none() { return Ref::borrow(Py_None); }

// From this many keys on, pickles have the original keys of a dict as a list: 1.2x the speed of dumping
// and 2.4x that of loading the dict that __getstate__() has, with its values and hashes
// (benchmarks/optree, transformer state). The published package reads either. Where the list is that
// of the keys in traversal order, pickle writes it once.
constexpr std::uint32_t kManyKeys = 16;

Ref original_keys(Kind kind, const Slot* slots, PyObject* data, bool for_pickle) {
    if (!is_mapping(kind) || kind == Kind::ordereddict) return none();
    KeyLayout* layout = as_layout(slots[0]);
    if (!for_pickle || layout->size < kManyKeys) return dict_of_keys(layout);
    if (layout->position == nullptr) {
        return Ref::borrow(kind == Kind::defaultdict ? PyTuple_GET_ITEM(data, 1) : data);
    }
    Ref list = checked(PyList_New(layout->size));
    for (std::uint32_t i = 0; i < layout->size; ++i) {
        PyList_SET_ITEM(list.get(), i, compat::new_ref(layout->inserted[i]));
    }
    return list;
}

Ref node_state(Kind kind, std::uint32_t arity, const Slot* slots, std::size_t leaves,
               std::size_t nodes, bool for_pickle) {
    Ref data = kind == Kind::leaf ? none() : node_data(kind, slots);
    if (!data) data = none();
    const bool custom = kind == Kind::custom;
    const Ref entries = custom && slots[2] != nullptr ? Ref::borrow(as_object(slots[2])) : none();
    const Ref type = custom ? Ref::borrow(as_registration(slots[0])->type) : none();
    const Ref original = original_keys(kind, slots, data.get(), for_pickle);
    return checked(Py_BuildValue("(iIOOOnnO)", static_cast<int>(kind),
                                 static_cast<unsigned int>(arity), data.get(), entries.get(),
                                 type.get(), static_cast<Py_ssize_t>(leaves),
                                 static_cast<Py_ssize_t>(nodes), original.get()));
}

// What the state of a node is made of.
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

[[noreturn]] OPTREE_COLD void malformed(const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    const Ref reason = Ref::steal(PyUnicode_FromFormatV(format, args));
    va_end(args);
    if (!reason) throw PythonError{};
    raise(PyExc_RuntimeError, "Malformed pickled PyTreeSpec: %U.", reason.get());
}

Py_ssize_t integer(PyObject* value, const char* what) {
    if (!PyLong_Check(value)) malformed("%s is not an integer", what);
    const Py_ssize_t number = PyLong_AsSsize_t(value);
    if (number == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        malformed("%s is out of range", what);
    }
    return number;
}

void require_none(PyObject* value, const char* what) {
    if (value != Py_None) malformed("%s", what);
}

// A list, or the keys of a dict, as a list that no other thread changes.
Ref snapshot(PyObject* list_or_dict) {
    if (!compat::kFreeThreaded && PyList_CheckExact(list_or_dict)) {
        return Ref::borrow(list_or_dict);
    }
    return checked(PySequence_List(list_or_dict));
}

bool is_sequence(PyObject* value) noexcept { return PyList_Check(value) || PyTuple_Check(value); }

// Collects the keys, which must be hashable and distinct. Hashing may run Python code, which must not
// find a list to change.
void collect_checked_keys(PyObject* keys, Py_ssize_t arity, ObjectStack& out) {
    if (!is_sequence(keys)) malformed("the keys of a dictionary node are not a list");
    collect(keys, out);
    if (static_cast<Py_ssize_t>(out.size()) != arity)
        malformed("the number of keys does not match the arity");
    const Ref set = checked(PyDict_New());
    for (std::size_t i = 0; i < out.size(); ++i) {
        if (PyDict_SetItem(set.get(), out[i], Py_None) < 0) {
            if (!PyErr_ExceptionMatches(PyExc_TypeError)) throw PythonError{};
            PyErr_Clear();
            malformed("the keys of a dictionary node are not hashable");
        }
    }
    if (PyDict_GET_SIZE(set.get()) != arity)
        malformed("the keys of a dictionary node are not distinct");
}

// The layout where `keys` is a list of sorted str or int, and `original` a list or dict of the very
// objects: what a pickle reads as. Null otherwise.
Ref plain_layout(State& state, PyObject* keys, PyObject* original, Py_ssize_t arity) {
    const auto is_plain = [](PyObject* object) {
        return PyList_CheckExact(object) || PyDict_CheckExact(object);
    };
    if (original == nullptr || !is_plain(original) || !PyList_CheckExact(keys)) return nullptr;
    const Ref sorted = snapshot(keys);
    const Ref inserted = snapshot(original);
    if (PyList_GET_SIZE(sorted.get()) != arity || PyList_GET_SIZE(inserted.get()) != arity) {
        return nullptr;
    }
    return make_layout_of_sorted(state.layout(), list_items(sorted.get()),
                                 list_items(inserted.get()), static_cast<std::size_t>(arity));
}

Ref checked_layout(State& state, Kind kind, PyObject* keys_object, PyObject* original,
                   Py_ssize_t arity) {
    if (Ref plain = plain_layout(state, keys_object, original, arity)) return plain;
    const auto size = static_cast<std::size_t>(arity);
    ObjectStack keys;
    collect_checked_keys(keys_object, arity, keys);
    if (kind == Kind::ordereddict || original == nullptr) {
        return make_layout(state.layout(), keys.data(), size, false);
    }
    if (!PyDict_Check(original) && !is_sequence(original)) {
        malformed("the original keys of a dictionary node are not a dict");
    }
    ObjectStack inserted;
    collect(original, inserted);
    // A subclass may iterate over other keys than it holds.
    if (inserted.size() != size) {
        malformed("the number of original keys does not match the number of keys");
    }
    try {
        return make_layout_with_order(state.layout(), keys.data(), inserted.data(), size);
    } catch (const PythonError&) {
        if (!PyErr_ExceptionMatches(PyExc_KeyError)) throw;
        PyErr_Clear();
        malformed("the original keys do not match the keys");
    }
}

PyTypeObject* checked_class(PyObject* value, const char* what) {
    if (!PyType_Check(value)) malformed("%s", what);
    return reinterpret_cast<PyTypeObject*>(value);
}

void check_field_count(PyObject* fields, Py_ssize_t arity) {
    if (PyTuple_GET_SIZE(fields) != arity)
        malformed("the number of fields does not match the arity");
}

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
    // A node whose state is the very object of an earlier node's: pickle keeps that they are one.
    void again(const Node& node) {
        const Node like = node;  // the table may move
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
        const Py_ssize_t number = integer(at(0), "the kind of a node");
        if (number < 0 || number >= kNumKinds) malformed("the kind of a node is out of range");
        const auto kind = static_cast<Kind>(number);
        if (kind == Kind::frozendict) {
            raise(PyExc_ValueError,
                  "Cannot restore a PyTreeSpec containing a `frozendict` node: this build of "
                  "optree was "
                  "compiled without `frozendict` support (requires Python 3.15+).");
        }
        const Py_ssize_t arity = integer(at(1), "the arity of a node");
        if (arity < 0) malformed("the arity of a node is negative");
        checked_count(static_cast<std::size_t>(arity));
        const Py_ssize_t leaves = integer(at(5), "the number of leaves of a node");
        const Py_ssize_t nodes = integer(at(6), "the number of nodes of a node");
        if (leaves < 0 || nodes < 1) malformed("the counts of a node are out of range");
        PyObject* original = size == 8 ? at(7) : nullptr;
        const bool keeps_order = is_mapping(kind) && kind != Kind::ordereddict;
        if (original != nullptr && (original != Py_None) != keeps_order) {
            malformed("the original keys are present for the wrong kind of node");
        }
        if (kind != Kind::custom) {
            require_none(at(3), "a node that is not custom has entries");
            require_none(at(4), "a node that is not custom has a custom type");
        }
        add(kind, arity, at(2), at(3), at(4), original);
        require_counts(static_cast<std::size_t>(leaves), static_cast<std::size_t>(nodes));
    }

    void add(Kind kind, Py_ssize_t arity, PyObject* data, PyObject* entries, PyObject* type,
             PyObject* original) {
        if (kind == Kind::leaf) {
            require_none(data, "a leaf has node data");
            if (arity != 0) malformed("a leaf has children");
            return build_.leaf();
        }
        if (static_cast<std::size_t>(arity) > build_.open()) {
            malformed("a node has more children than there are nodes before it");
        }
        Payload payload;
        switch (kind) {
            case Kind::none:
                require_none(data, "a None node has node data");
                if (arity != 0) malformed("a None node has children");
                if (none_is_leaf_) malformed("a None node stands where None is a leaf");
                break;
            case Kind::tuple:
            case Kind::list: require_none(data, "a tuple or list node has node data"); break;
            case Kind::dict:
            case Kind::ordereddict:
                payload.slot[0] = checked_layout(state_, kind, data, original, arity);
                break;
            case Kind::defaultdict: defaultdict(data, original, arity, payload); break;
            case Kind::namedtuple: {
                PyTypeObject* cls =
                    checked_class(data, "the node data of a namedtuple node is not a class");
                if (!state_.namedtuples.contains(cls))
                    malformed("%R is not a namedtuple class", cls);
                check_field_count(namedtuple_fields(cls).get(), arity);
                payload.slot[0] = Ref::borrow(data);
                break;
            }
            case Kind::structseq: {
                PyTypeObject* cls =
                    checked_class(data, "the node data of a PyStructSequence node is not a class");
                if (!state_.structseqs.contains(cls))
                    malformed("%R is not a PyStructSequence class", cls);
                check_field_count(structseq_fields(cls).get(), arity);
                payload.slot[0] = Ref::borrow(data);
                break;
            }
            case Kind::deque:
                if (data != Py_None) {
                    if (integer(data, "the maxlen of a deque node") < arity) {
                        malformed("the maxlen of a deque node is less than its arity");
                    }
                    payload.slot[0] = Ref::borrow(data);
                }
                break;
            case Kind::custom: custom(arity, data, entries, type, payload); break;
            default: malformed("the kind of a node is out of range");
        }
        push_payload(out_, kind, payload);
        build_.close(kind, static_cast<std::uint32_t>(arity));
    }

    void defaultdict(PyObject* data, PyObject* original, Py_ssize_t arity, Payload& payload) {
        if (!PyTuple_Check(data) && !PyList_Check(data)) {
            malformed("the node data of a defaultdict node is not a pair");
        }
        const Ref pair = collected_tuple(data);
        if (PyTuple_GET_SIZE(pair.get()) != 2)
            malformed("the node data of a defaultdict node is not a pair");
        PyObject* factory = PyTuple_GET_ITEM(pair.get(), 0);
        if (factory != Py_None && PyCallable_Check(factory) == 0) {
            malformed("the default factory of a defaultdict node is not callable");
        }
        payload.slot[0] = checked_layout(state_, Kind::defaultdict, PyTuple_GET_ITEM(pair.get(), 1),
                                         original, arity);
        payload.slot[1] = Ref::borrow(factory);
    }

    void custom(Py_ssize_t arity, PyObject* data, PyObject* entries, PyObject* type,
                Payload& payload) {
        PyTypeObject* cls = checked_class(type, "the custom type of a custom node is not a class");
        if (is_builtin_node(state_, type))
            malformed("the custom type is a built-in type: %R", type);
        payload.slot[0] = state_.registry.lookup(state_.registry.find(name_), cls);
        if (!payload.slot[0]) {
            if (is_empty_str(name_)) {
                raise(PyExc_RuntimeError,
                      "Unknown custom type in pickled PyTreeSpec: %R in the global namespace.",
                      type);
            }
            raise(PyExc_RuntimeError,
                  "Unknown custom type in pickled PyTreeSpec: %R in namespace %R.", type, name_);
        }
        payload.slot[1] = Ref::borrow(data);
        if (entries != Py_None) {
            if (!is_sequence(entries)) malformed("the entries of a custom node are not a tuple");
            payload.slot[2] = collected_tuple(entries);
            if (PyTuple_GET_SIZE(payload.slot[2].get()) != arity) {
                malformed("the number of entries does not match the arity");
            }
        }
    }

    State& state_;
    bool none_is_leaf_;
    PyObject* name_;
    Tree& out_;
    Builder build_;
    PyObject* leaf_ = nullptr;                            // the last state of a leaf
    std::unordered_map<PyObject*, std::uint32_t> known_;  // state -> the node it was read into
};

}  // namespace

Ref spec_getstate(const SpecObject& spec, bool for_pickle) {
    // Collected aside: hashing keys may run Python code, which must not find a half-filled tuple.
    ObjectStack states;
    states.reserve(spec.tree.num_nodes());
    // Nodes with equal states share one object, which pickle writes once: 3x to 10x of dumping and
    // loading (benchmarks/optree).
    const Ref leaf = node_state(Kind::leaf, 0, nullptr, 1, 1, for_pickle);
    std::map<NodeKey, PyObject*> known;
    std::uint32_t taken = 0;
    for (const Node& node : spec.tree.nodes) {
        for (; taken < node.leaf_end; ++taken) states.push(leaf.get());
        const Slot* slots = slots_of(spec.tree, node);
        PyObject*& state = known[NodeKey(node, slots)];
        if (state == nullptr) {
            state = node_state(node.kind, node.arity, slots, node.leaves,
                               std::size_t{node.span} + node.leaves, for_pickle)
                        .release();
            states.push_owned(state);  // which keeps it for `known`
        } else {
            states.push(state);
        }
    }
    if (spec.tree.nodes.empty()) states.push(leaf.get());
    const Ref nodes = states.into_tuple();
    return checked(
        Py_BuildValue("(OOO)", nodes.get(), spec.none_is_leaf ? Py_True : Py_False, spec.name));
}

Ref spec_reduce(PyObject* self, bool for_pickle) {
    const SpecObject& spec = as_spec(self);
    const Ref state = spec_getstate(spec, for_pickle);
    // Py_BuildValue would show the outer tuple to the collector while it makes the inner one.
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
        // Specs are immutable once they have a state: others may be walking over this one.
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
