# SPDX-License-Identifier: Apache-2.0
"""Split graphs of operations where cotangents come in, and decide what is kept in between."""

from __future__ import annotations

import operator
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from torchopt.torch_internals.tracing import is_drawn, writes

__all__ = ["split_graph"]

aten = torch.ops.aten


def split_graph(
    graph: torch.fx.GraphModule,
    count: int,
    cotangents: Sequence[int],
    *,
    recompute: bool,
    room: int | None = None,
    softmaxes: int = 0,
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule, list[int]]:
    """Split a graph into the part that depends on no cotangent and the rest.

    The first part returns `count` results, followed by the values that the second part needs. The
    second part takes these values, then some arguments of the first part, then the cotangents.

    Args:
        graph: A graph whose output is a list.
        count: The number of results, from the first, that depend on no cotangent; the others may.
        cotangents: The positions of the arguments that are cotangents.
        recompute: Whether the second part recomputes values that need only views and elementwise
            operations, which a compiler fuses, so that fewer tensors are saved.
        room: If given, the second part recomputes everything except the products of matrices and
            the softmaxes that fit into so many bytes.
        softmaxes: The bytes that softmaxes may take of these.

    Returns:
        (first part, second part, positions of the arguments of the first part that the second
        part takes).
    """
    *nodes, output = graph.graph.nodes
    arguments = [n for n in nodes if n.op == "placeholder"]
    given = [arguments[i] for i in cotangents]
    later = set(given)
    for node in nodes:
        if any(x in later for x in node.all_input_nodes):
            later.add(node)
    early = [n for n in nodes if n not in later and n.op != "placeholder"]
    (results,) = output.args
    wanted = [x for x in results[count:] if isinstance(x, torch.fx.Node)]
    read = [x for n in nodes if n in later for x in n.all_input_nodes]
    kept = dict.fromkeys(x for x in (*read, *wanted) if x not in later)
    known = [n for n in arguments if n not in later]
    again: set[torch.fx.Node] = set()
    if room is not None:
        candidates = _computed_again(known, early, dict(kept), set())
        saved = _saved_within(room, softmaxes, early, candidates - _written(nodes))
        again = _computed_again(known, early, kept, saved)
        if writes(nodes):  # perhaps to a view, which the edges of the graph do not show
            again = set(early) - saved
            kept = dict.fromkeys((*known, *(n for n in early if n in saved)))
    elif recompute and not writes(nodes):
        again = _computed_again(known, early, kept, None)
    passed = [i for i, n in enumerate(known) if n in kept]
    made = [n for n in kept if n.op != "placeholder"]
    first = _extracted(graph, known, early, [*results[:count], *made])
    rest = [n for n in nodes if n in again or (n in later and n.op != "placeholder")]
    taken = [*made, *(known[i] for i in passed), *given]
    return first, _extracted(graph, taken, rest, results[count:]), passed


_FUSED = {
    *("_to_copy", "full", "full_like", "lift_fresh_copy", "new_full", "new_ones", "new_zeros"),
    *("ones", "ones_like", "scalar_tensor", "zeros", "zeros_like"),
}


# Each element takes a series or a table, which is slower than to store the result and load it.
_LONG = {
    *("acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cos", "cosh", "sin", "sinh"),
    *("celu", "elu", "erf", "erfc", "erfinv", "exp", "exp2", "expm1", "gelu", "log", "log10"),
    *("log1p", "log2", "logaddexp", "logit", "lgamma", "digamma", "mish", "pow", "sigmoid"),
    *("silu", "softplus", "tan", "tanh", "xlogy", "log_sigmoid_forward"),
}


def _is_fused(node: torch.fx.Node) -> bool:
    """Return whether an operation is nearly free in a compiled program."""
    schema, tags = getattr(node.target, "_schema", None), getattr(node.target, "tags", ())
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    if schema is None or is_drawn(node):
        return False
    name = schema.name.removeprefix("aten::")
    if name in _LONG and not _is_number(node):
        return name == "pow" and not isinstance(node.args[1], torch.fx.Node)
    if torch.Tag.pointwise in tags or name in _FUSED:
        return True
    return any(x.alias_info is not None for x in schema.returns)


def _is_number(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 0


def _computed_again(
    arguments: Sequence[torch.fx.Node],
    early: Sequence[torch.fx.Node],
    kept: dict[torch.fx.Node, None],
    saved: Set[torch.fx.Node] | None,
) -> set[torch.fx.Node]:
    """Remove from `kept` all values that can be recomputed from the others.

    The arguments are available anyway. Return the operations that recompute the removed values.

    Args:
        arguments: The arguments.
        early: The operations, in order.
        kept: The values that are needed.
        saved: The operations whose values are not recomputed. None: all that a compiler does not
            fuse.
    """
    ready, made = set(arguments), set()
    for node in early:
        free = _is_fused(node) if saved is None else node not in saved
        if free and all(x in ready for x in node.all_input_nodes):
            made.add(node)
            ready.add(node)
        elif node in kept or saved is not None:
            ready.add(node)
    again: set[torch.fx.Node] = set()
    for node in reversed(early):
        if node in made and (node in kept or node in again):
            kept.pop(node, None)
            again.add(node)
            again.update(x for x in node.all_input_nodes if x in made)
    used = {x for n in again for x in n.all_input_nodes}
    kept.update(dict.fromkeys(x for x in (*arguments, *early) if x in used and x not in made))
    return again


# The position of the left factor among the arguments.
_PRODUCTS: dict[Any, int] = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
LEAST = 32  # multiplications for each element of a product that is saved
SOFTMAX = 64  # those that take as long as an element of a softmax


def _saved_within(
    room: int, softmaxes: int, nodes: Sequence[torch.fx.Node], candidates: Set[torch.fx.Node]
) -> set[torch.fx.Node]:
    """Return the products of matrices and the softmaxes that take the most time for their memory.

    A sum with a product, such as its tangent, counts as one. A softmax counts if nothing else, such
    as its tangent, reads the scores.

    Args:
        room: The bytes that all may take together.
        softmaxes: The bytes that softmaxes may take of these.
        nodes: Operations, in order.
        candidates: Those of which the value may be returned.
    """
    counts: dict[torch.fx.Node, int] = {}
    for node in nodes:
        if node.target in _PRODUCTS:
            left: Any = node.args[_PRODUCTS[node.target]]
            counts[node] = left.meta["val"].shape[-1]
        elif node.target is aten._softmax.default and len(node.all_input_nodes[0].users) == 1:
            counts[node] = SOFTMAX
        elif node.target is aten.add.Tensor:
            terms = [x for x in node.all_input_nodes if x in counts and _is_term(x, node)]
            if terms:
                counts[node] = sum(map(counts.pop, terms))
    found = set()
    for node in sorted(counts, key=lambda x: -counts[x] / x.meta["val"].itemsize):
        size, is_product = node.meta["val"].nbytes, node.target is not aten._softmax.default
        fits = size <= (room if is_product else min(room, softmaxes))
        if node in candidates and counts[node] >= LEAST and fits:
            room -= size
            softmaxes -= 0 if is_product else size
            found.add(node)
    return found


def _written(nodes: Sequence[torch.fx.Node]) -> set[torch.fx.Node]:
    """Return the operations to whose results, or to views of them, another operation writes."""
    found: set[torch.fx.Node] = set()
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        for i, argument in enumerate(() if schema is None else schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            x: Any = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            reached = list(x) if isinstance(x, (list, tuple)) else [x]
            for y in reached:
                if isinstance(y, torch.fx.Node):
                    found.add(y)
                    returns = getattr(getattr(y.target, "_schema", None), "returns", ())
                    if any(r.alias_info is not None for r in returns):
                        reached += y.all_input_nodes
    return found


def _is_term(x: torch.fx.Node, total: torch.fx.Node) -> bool:
    shapes = x.meta["val"].shape, total.meta["val"].shape
    return len(x.users) == 1 and shapes[0] == shapes[1]


def _extracted(
    graph: torch.fx.GraphModule, arguments: Any, nodes: Any, results: Any
) -> torch.fx.GraphModule:
    made = torch.fx.Graph()
    known = {}
    for node in arguments:
        known[node] = made.placeholder(node.name)
        known[node].meta.update(node.meta)
    for node in nodes:
        known[node] = made.node_copy(node, known.__getitem__)
    made.output([known[x] if isinstance(x, torch.fx.Node) else x for x in results])
    made.eliminate_dead_code()
    return torch.fx.GraphModule(graph, made)
