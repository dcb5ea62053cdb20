// SPDX-License-Identifier: Apache-2.0
#include "walk/flatten_up_to.h"

namespace optree {

void flatten_up_to(Context& context, const TreeView& tree, PyObject* object, ObjectStack& out) {
    const std::size_t base = out.extend(tree.leaves);
    std::size_t next = base + tree.leaves;  // leaves are found from the last to the first
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
            match(context, node.kind, tree.slots + node.payload, node.arity, current.get(), agenda);
        }
        const std::uint32_t before = i != 0 ? tree.nodes[i - 1].leaf_end : 0;
        for (std::uint32_t leaf = node.leaf_end; leaf > before; --leaf) out[--next] = agenda.pop();
    }
}

}  // namespace optree
