# SPDX-License-Identifier: Apache-2.0
"""Store the results of a graph that loops over larger tensors read.

Inductor writes an elementwise operation into each loop that reads its result. A loop over a larger
tensor then computes it again for each of its vectors: the power in Adam's correction of the bias,
or the weights after a step in a product that is written as a loop. It stores the results of
exponentials that several loops read, but not those of error functions, which take longer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

__all__ = ["repeated_reads_stored"]

# A result is stored if a loop has TIMES its elements or more, and at least LEAST more than it has.
TIMES, LEAST = 2, 256


def repeated_reads_stored(graph: GraphModule) -> None:
    """Store such results of a graph without writes, whose nodes have values."""
    *nodes, output = graph.graph.nodes
    found: dict[Node, None] = {}
    for node in filter(_is_elementwise, nodes):
        if node.target is torch.ops.aten.erf.default and len(node.users) > 1:
            found[node] = None
        size = node.meta["val"].numel()
        for x in filter(_is_elementwise, map(_base, node.all_input_nodes)):
            small = x.meta["val"].numel()
            if x.all_input_nodes and size >= TIMES * small and size - small >= LEAST:
                found[x] = None
    store = torch.ops._inductor_test.realize.default
    for node in found:
        with graph.graph.inserting_after(node):
            stored = graph.graph.call_function(store, (node,))
        stored.meta.update(node.meta)
        for user in list(node.users):
            if user not in (stored, output):
                user.replace_input_with(node, stored)
    graph.recompile()


def _is_elementwise(node: Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) and not _is_view(node)


def _is_view(node: Node) -> bool:
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return any(x.alias_info is not None for x in returns)


def _base(node: Node) -> Node:
    """Return the node whose memory a node shows."""
    while _is_view(node):
        first: Any = node.args[0]
        node = first
    return node
