// SPDX-License-Identifier: Apache-2.0
#include "walk/spec_object.h"

#include <new>
#include <utility>

namespace optree {

Ref new_spec(State& state, bool none_is_leaf, PyObject* name) {
    PyTypeObject* type = state.spec();
    PyObject* self = state.specs.take(type);
    const bool reused = self != nullptr;
    if (OPTREE_UNLIKELY(!reused)) self = checked(type->tp_alloc(type, 0)).release();
    SpecObject& spec = as_spec(self);
    new (&spec.tree) Tree;
    spec.weakrefs = nullptr;
    spec.state = compat::new_ref(reinterpret_cast<PyObject*>(&state));
    spec.name = compat::new_ref(name);
    spec.none_is_leaf = none_is_leaf;
    if (reused) PyObject_GC_Track(self);
    return Ref::steal(self);
}

Ref new_spec(State& state, bool none_is_leaf, PyObject* name, TreeOwner& owner) {
    Ref self = new_spec(state, none_is_leaf, name);
    Tree& tree = as_spec(self.get()).tree;
    tree.nodes = std::move(owner.tree.nodes);
    tree.slots = std::move(owner.tree.slots);
    tree.leaves = owner.tree.leaves;
    owner.tree.slots.clear();
    return self;
}

Ref new_leaf_spec(State& state, bool none_is_leaf, PyObject* name) {
    Ref self = new_spec(state, none_is_leaf, name);
    as_spec(self.get()).tree.leaves = 1;
    return self;
}

Ref spec_of_subtree(const SpecObject& spec, const Subtree& part) {
    TreeOwner owner;
    Builder(owner.tree).append(spec.tree, part, share_slot);
    return new_spec(state_of(spec), spec.none_is_leaf, spec.name, owner);
}

Ref spec_of_node(const SpecObject& spec, const Node& node) {
    TreeOwner owner;
    Builder build(owner.tree);
    for (std::uint32_t i = 0; i < node.arity; ++i) build.leaf();
    share_payload(owner.tree, node.kind, slots_of(spec.tree, node));
    build.close(node.kind, node.arity);
    return new_spec(state_of(spec), spec.none_is_leaf, spec.name, owner);
}

// The tests of the published package look for this file name, that of one of its own files.
void raise_uninitialised(const SpecObject& spec) {
    raise(state_of(spec).error(),
          "the PyTreeSpec was made by PyTreeSpec.__new__() and never given a state "
          "(src/treespec/serialization.cpp)");
}

SpecObject& checked_spec(State& state, PyObject* object) {
    if (!is_spec(state, object)) {
        raise(PyExc_TypeError, "expected an optree.PyTreeSpec, got %R of type %R", object,
              Py_TYPE(object));
    }
    SpecObject& spec = as_spec(object);
    require_initialised(spec);
    return spec;
}

bool same_text(PyObject* a, PyObject* b) {
    if (a == b) return true;
    const int order = PyUnicode_Compare(a, b);
    if (order == -1 && PyErr_Occurred()) throw PythonError{};
    return order == 0;
}

bool namespaces_agree(PyObject* a, PyObject* b) {
    return a == b || is_empty_str(a) || is_empty_str(b) || same_text(a, b);
}

void require_same_registration(State& state, Registration* registration, PyObject* name,
                               const char* what) {
    const Ref found = state.registry.lookup(state.registry.find(name),
                                            reinterpret_cast<PyTypeObject*>(registration->type));
    if (found.get() != reinterpret_cast<PyObject*>(registration)) {
        raise(PyExc_ValueError,
              "%s: custom PyTree type %R no longer resolves to its original registration in "
              "namespace %R.",
              what, registration->type, name);
    }
}

void require_same_registrations(const SpecObject& spec, PyObject* name, const char* what) {
    State& state = state_of(spec);
    for (const Node& node : spec.tree.nodes) {
        Registration* registration = registration_of(node.kind, slots_of(spec.tree, node));
        if (registration != nullptr) require_same_registration(state, registration, name, what);
    }
}

// ---- garbage collection and deallocation of specs

int spec_traverse(PyObject* self, visitproc visit, void* arg) {
    const SpecObject& spec = as_spec(self);
    OPTREE_VISIT_TYPE(self);
    Py_VISIT(spec.state);
    for (Slot slot : spec.tree.slots) {
        if (const int status = visit_slot(slot, visit, arg)) return status;
    }
    return 0;
}

int spec_clear(PyObject* self) {
    SpecObject& spec = as_spec(self);
    Tree dropped;
    std::swap(dropped.nodes, spec.tree.nodes);
    std::swap(dropped.slots, spec.tree.slots);
    spec.tree.leaves = 0;
    for (Slot slot : dropped.slots) drop_slot(slot);
    return 0;
}

namespace {

// Whether the objects that the spec owns may hold specs. Gives a definite answer only for small
// trees.
bool may_nest(const Tree& tree) noexcept {
    if (tree.nodes.size() > 1) return true;
    if (tree.nodes.empty()) return false;
    return dispatch_slots(tree.nodes[0].kind,
                          [&](auto list) { return list.may_nest(tree.slots.data()); });
}

void destroy(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    SpecObject& spec = as_spec(self);
    if (spec.weakrefs != nullptr) PyObject_ClearWeakRefs(self);
    for (Slot slot : spec.tree.slots) drop_slot(slot);
    spec.tree.~Tree();
    Py_XDECREF(spec.name);
    PyObject* state = spec.state;
    const bool exact = state != nullptr && type == as_state(state).spec();
    if (!exact || !as_state(state).specs.give(self)) type->tp_free(self);
    Py_XDECREF(state);  // the last reference frees the pool
    Py_DECREF(type);
}

}  // namespace

void spec_dealloc(PyObject* self) {
    PyObject_GC_UnTrack(self);
    if (!may_nest(as_spec(self).tree)) return destroy(self);
    // Metadata and keys may hold specs, nested deeper than the C stack allows.
    Py_TRASHCAN_BEGIN(self, spec_dealloc);
    destroy(self);
    Py_TRASHCAN_END;
}

}  // namespace optree
