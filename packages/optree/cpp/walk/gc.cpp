// SPDX-License-Identifier: Apache-2.0
// What the garbage collector sees of a spec, and how a spec dies.
#include <utility>

#include "walk/gc.h"

namespace optree {
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

// Whether what the spec owns may own specs in turn. Answers for small trees only.
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
    Py_XDECREF(state);  // the last one frees the pool
    Py_DECREF(type);
}

}  // namespace

void spec_dealloc(PyObject* self) {
    PyObject_GC_UnTrack(self);
    if (!may_nest(as_spec(self).tree)) return destroy(self);
    // Metadata and keys may hold specs, deeper than the C stack is.
    Py_TRASHCAN_BEGIN(self, spec_dealloc);
    destroy(self);
    Py_TRASHCAN_END;
}

}  // namespace optree
