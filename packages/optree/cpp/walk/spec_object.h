// SPDX-License-Identifier: Apache-2.0
// The Python object PyTreeSpec: a Tree, the two options with which it was flattened, and its state.
#pragma once

#include "nodes/context.h"
#include "nodes/dispatch.h"
#include "spec/equal.h"
#include "spec/tree.h"

namespace optree {

struct SpecObject {
    PyObject_HEAD
    PyObject* weakrefs;
    PyObject* state;  // owned
    PyObject* name;   // owned; the namespace, an exact str
    bool none_is_leaf;
    Tree tree;  // owns a reference to every non-null slot; has no nodes and leaves until
                // an object made by __new__ is given its state, and after tp_clear
};

// A tree under construction. It owns the objects in its slots.
struct TreeOwner {
    Tree tree;

    TreeOwner() = default;
    TreeOwner(const TreeOwner&) = delete;
    TreeOwner& operator=(const TreeOwner&) = delete;
    ~TreeOwner() {
        for (Slot slot : tree.slots) drop_slot(slot);
    }
};

inline SpecObject& as_spec(PyObject* object) noexcept {
    return *reinterpret_cast<SpecObject*>(object);
}
inline State& state_of(const SpecObject& spec) noexcept { return as_state(spec.state); }

inline const Slot* slots_of(const Tree& tree, const Node& node) noexcept {
    return tree.slots.data() + node.payload;
}

// Appends new references to the slots of a node of another tree.
inline void share_payload(Tree& tree, Kind kind, const Slot* slots) {
    tree.slots.reserve(tree.slots.size() + slot_count(kind));
    for (std::size_t i = 0; i < slot_count(kind); ++i) tree.slots.push_back(share_slot(slots[i]));
}

// Moves the payload of a node of `kind` to the slots of a tree.
inline void push_payload(Tree& tree, Kind kind, Payload& payload) {
    tree.slots.reserve(tree.slots.size() + slot_count(kind));
    for (std::size_t i = 0; i < slot_count(kind); ++i)
        tree.slots.push_back(payload.slot[i].release());
}

// A spec with an empty tree. The caller must fill it before Python code can run.
Ref new_spec(State& state, bool none_is_leaf, PyObject* name);
// A spec that takes over a complete tree.
Ref new_spec(State& state, bool none_is_leaf, PyObject* name, TreeOwner& owner);
// A spec that is a single leaf.
Ref new_leaf_spec(State& state, bool none_is_leaf, PyObject* name);

// The slots of the class.
int spec_traverse(PyObject* self, visitproc visit, void* arg);
int spec_clear(PyObject* self);
void spec_dealloc(PyObject* self);

// A spec with a copy of one subtree of `spec`.
Ref spec_of_subtree(const SpecObject& spec, const Subtree& part);

// A spec of one node of `spec`, with leaves as children.
Ref spec_of_node(const SpecObject& spec, const Node& node);

inline bool is_spec(const State& state, PyObject* object) noexcept {
    return Py_TYPE(object) == state.spec();
}

inline bool is_initialised(const SpecObject& spec) noexcept {
    return spec.tree.leaves != 0 || !spec.tree.nodes.empty();
}
// Raises InternalError for a spec without a tree.
[[noreturn]] OPTREE_COLD void raise_uninitialised(const SpecObject& spec);
inline void require_initialised(const SpecObject& spec) {
    if (OPTREE_UNLIKELY(!is_initialised(spec))) raise_uninitialised(spec);
}
// Returns `object` as an initialised spec. Raises TypeError for anything else.
SpecObject& checked_spec(State& state, PyObject* object);

inline bool is_empty_str(PyObject* name) noexcept { return PyUnicode_GET_LENGTH(name) == 0; }
// Whether two namespaces agree: they are equal, or one of them is unspecified.
bool namespaces_agree(PyObject* a, PyObject* b);
bool same_text(PyObject* a, PyObject* b);
// For a class, or a custom node of `spec`, without a namespace: raises ValueError if it resolves to
// another registration in the namespace `name`. `what` begins the message.
void require_same_registration(State& state, Registration* registration, PyObject* name,
                               const char* what);
void require_same_registrations(const SpecObject& spec, PyObject* name, const char* what);

}  // namespace optree
