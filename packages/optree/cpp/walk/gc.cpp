// SPDX-License-Identifier: Apache-2.0
// What the garbage collector sees of a spec, and how a spec dies.
#include <algorithm>
#include <new>
#include <vector>

#include "walk/gc.h"

namespace optree {
namespace {

// Layouts and registrations are shared and not collected themselves. A spec reports what they hold
// only where all references to them are its own, so that nothing is reported twice.
template <class Report>
int for_shared_once(const Tree& tree, bool mappings, Report&& report) {
    std::vector<PyObject*> shared;
    for (const Node& node : tree.nodes) {
        if (mappings ? is_mapping(node.kind) : node.kind == Kind::custom) {
            shared.push_back(as_object(tree.slots[node.payload]));
        }
    }
    std::sort(shared.begin(), shared.end());
    for (auto first = shared.begin(); first != shared.end();) {
        const auto last = std::upper_bound(first, shared.end(), *first);
        if (*first != nullptr && Py_REFCNT(*first) == last - first) {
            if (const int status = report(*first)) return status;
        }
        first = last;
    }
    return 0;
}

}  // namespace

int spec_traverse(PyObject* self, visitproc visit, void* arg) {
    const SpecObject& spec = as_spec(self);
    OPTREE_VISIT_TYPE(self);
    Py_VISIT(spec.state);
    bool custom = false;
    bool loose_keys = false;
    for (const Node& node : spec.tree.nodes) {
        const Slot* slots = slots_of(spec.tree, node);
        switch (node.kind) {
            case Kind::dict:
            case Kind::frozendict:
            case Kind::ordereddict: loose_keys = loose_keys || !as_layout(slots[0])->atomic; break;
            case Kind::defaultdict:
                loose_keys = loose_keys || !as_layout(slots[0])->atomic;
                Py_VISIT(as_object(slots[1]));
                break;
            case Kind::namedtuple:
            case Kind::structseq:
            case Kind::deque: Py_VISIT(as_object(slots[0])); break;
            case Kind::custom:
                custom = true;
                Py_VISIT(as_object(slots[1]));
                Py_VISIT(as_object(slots[2]));
                break;
            default: break;
        }
    }
    if (loose_keys) {
        const int status = for_shared_once(spec.tree, true, [&](PyObject* shared) {
            const KeyLayout* layout = as_layout(shared);
            for (std::uint32_t i = 0; i < layout->size; ++i) Py_VISIT(layout->inserted[i]);
            return 0;
        });
        if (status != 0) return status;
    }
    if (custom) {
        return for_shared_once(spec.tree, false, [&](PyObject* shared) {
            const Registration* registration = as_registration(shared);
            Py_VISIT(registration->type);
            Py_VISIT(registration->flatten_func);
            Py_VISIT(registration->unflatten_func);
            Py_VISIT(registration->path_entry_type);
            return 0;
        });
    }
    return 0;
}

int spec_clear(PyObject* self) {
    SpecObject& spec = as_spec(self);
    Tree dropped;
    std::swap(dropped.nodes, spec.tree.nodes);
    std::swap(dropped.slots, spec.tree.slots);
    spec.tree.leaves = 0;
    for (Slot slot : dropped.slots) Py_XDECREF(as_object(slot));
    return 0;
}

namespace {

// Whether what the spec owns may own specs in turn. Answers for small trees only.
bool may_nest(const Tree& tree) noexcept {
    if (tree.nodes.size() > 1) return true;
    if (tree.nodes.empty()) return false;
    switch (tree.nodes[0].kind) {
        case Kind::none:
        case Kind::tuple:
        case Kind::list: return false;
        case Kind::dict:
        case Kind::ordereddict: return !as_layout(tree.slots[0])->atomic;
        default: return true;
    }
}

void destroy(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    SpecObject& spec = as_spec(self);
    if (spec.weakrefs != nullptr) PyObject_ClearWeakRefs(self);
    for (Slot slot : spec.tree.slots) Py_XDECREF(as_object(slot));
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
