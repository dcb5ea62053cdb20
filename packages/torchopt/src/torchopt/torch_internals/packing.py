# SPDX-License-Identifier: Apache-2.0
"""Pack many small tensors into one, by hand or in the results of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["flattened", "is_packable", "pack_between", "unflattened"]

SMALL_BYTES = 2**16  # larger tensors are not packed with others
aten = torch.ops.aten


def flattened(tensors: Sequence[Tensor]) -> Tensor:
    """Return the concatenated elements of tensors of one dtype, `[total]`."""
    found: Tensor = torch._C._nn.flatten_dense_tensors(list(tensors))
    return found


def unflattened(flat: Tensor, like: list[Tensor]) -> Sequence[Tensor]:
    """Return consecutive parts of `flat`, as views with the shapes of these tensors.

    None of the tensors may be empty.
    """
    found: Sequence[Tensor] = torch._C._nn.unflatten_dense_tensors(flat, like)
    return found


def pack_between(first: torch.fx.GraphModule, second: torch.fx.GraphModule, begin: int) -> None:
    """Pack small results of one graph, which are the first arguments of another, into one buffer.

    Args:
        first: A graph whose output is a list; it is changed.
        second: A graph whose first arguments are the results of `first` from `begin` on; it is
            changed.
        begin: The position of the first of these results.
    """
    *_, output = first.graph.nodes
    (results,) = output.args
    made = list(results[begin:])
    arguments = [n for n in second.graph.nodes if n.op == "placeholder"][: len(made)]
    values = [n.meta["val"] for n in made]
    dtype = next((x.dtype for x in values if x.is_floating_point()), None)
    inside = [i for i, x in enumerate(values) if x.dtype is dtype and is_packable(x)]
    if len(inside) < 2:
        return
    with first.graph.inserting_before(output):
        rows = [first.graph.call_function(aten.reshape.default, (made[i], [-1])) for i in inside]
        buffer = first.graph.call_function(aten.cat.default, (rows,))
    output.args = ([*results[:begin], buffer, *(n for i, n in enumerate(made) if i not in inside)],)
    with second.graph.inserting_before(next(iter(second.graph.nodes))):
        taken = second.graph.placeholder("packed")
    after = [n for n in second.graph.nodes if n.op == "placeholder"][-1]
    start = 0
    for i in inside:
        end = start + values[i].numel()
        with second.graph.inserting_after(after):
            row = second.graph.call_function(aten.slice.Tensor, (taken, 0, start, end))
        with second.graph.inserting_after(row):
            part = second.graph.call_function(aten.view.default, (row, list(values[i].shape)))
        arguments[i].replace_all_uses_with(part)
        second.graph.erase_node(arguments[i])
        start, after = end, part
    first.recompile()
    second.recompile()


def is_packable(x: Tensor) -> bool:
    """Return whether a tensor is packed with others of its dtype."""
    return x.device.type == "cpu" and x.is_contiguous() and 0 < x.nbytes <= SMALL_BYTES
