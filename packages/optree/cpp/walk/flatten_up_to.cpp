// SPDX-License-Identifier: Apache-2.0
#include "walk/flatten_up_to.h"

namespace optree {
namespace {

// The place of the node with this index, such as $['layers'][2].weight.
Ref place_of(const TreeView& tree, std::size_t wanted) {
    Ref place = checked(PyUnicode_FromString("$"));
    std::size_t at = tree.num_nodes - 1;
    while (at != wanted) {
        const Node& node = tree.nodes[at];
        Cursor cursor{tree.nodes, static_cast<std::uint32_t>(at), node.leaf_end};
        for (std::uint32_t child = node.arity; child-- > 0; cursor.skip()) {
            const Node* below = cursor.node();
            if (below == nullptr) continue;
            const auto last = static_cast<std::size_t>(below - tree.nodes);
            if (wanted > last || wanted + below->span <= last) continue;
            const Ref step = node_step(node.kind, tree.slots + node.payload, child);
            place = checked(PyUnicode_Concat(place.get(), step.get()));
            at = last;
            break;
        }
    }
    return place;
}

// Adds the place of a mismatch as a note to the ValueError that is set. The message itself stays
// that of the published package.
OPTREE_COLD void note_place(const TreeView& tree, std::size_t node) {
    if (!compat::kHasNotes || !PyErr_ExceptionMatches(PyExc_ValueError)) return;
    PyObject* type = nullptr;
    PyObject* value = nullptr;
    PyObject* traceback = nullptr;
    PyErr_Fetch(&type, &value, &traceback);  // finding the place runs Python code
    Ref place;
    try {
        place = place_of(tree, node);
    } catch (const PythonError&) {
        PyErr_Clear();  // keep the original exception
    }
    PyErr_Restore(type, value, traceback);
    if (place) add_note("The trees differ at %U.", place.get());
}

}  // namespace

void flatten_up_to(Context& context, const TreeView& tree, PyObject* object, ObjectStack& out) {
    const std::size_t base = out.extend(tree.leaves);
    std::size_t next = base + tree.leaves;  // leaves are found from last to first
    if (tree.num_nodes == 0) {
        out[base] = compat::new_ref(object);
        return;
    }
    ObjectStack agenda;
    agenda.push(object);
    for (std::size_t i = tree.num_nodes; i-- > 0;) {
        const Node& node = tree.nodes[i];
        {
            const Ref current = Ref::steal(agenda.pop());
            try {
                match(context, node.kind, tree.slots + node.payload, node.arity, current.get(),
                      agenda);
            } catch (const PythonError&) {
                note_place(tree, i);
                throw;
            }
        }
        const std::uint32_t before = i != 0 ? tree.nodes[i - 1].leaf_end : 0;
        for (std::uint32_t leaf = node.leaf_end; leaf > before; --leaf) out[--next] = agenda.pop();
    }
}

}  // namespace optree
