# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of convolutions in a graph, as torch computes first derivatives.

The derivative of a convolution's weight in the direction of an input x, for a cotangent c, is the
sum over images and positions of products of both. `convolution_backward` computes it. In a second
derivative, torch instead convolves x with c, one group after the other, with images and channels
exchanged. The kernels are then as large as an image, which takes two to five times as long.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

__all__ = ["weight_gradients_restored"]

aten = torch.ops.aten


def weight_gradients_restored(graph: GraphModule) -> bool:
    """Replace convolutions with cotangents as kernels; return whether there were any.

    Args:
        graph: A graph of operations without in-place writes, whose nodes have values.
    """
    found = False
    for node in graph.graph.nodes:
        parts = _parts(node)
        whole = parts and _sources(parts)
        if whole:
            _replace(graph.graph, node, parts[0], *whole)
            found = True
    if found:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return found


def _parts(node: Node) -> list[Node]:
    """Return the convolutions, one for each group, whose results a node joins."""
    if node.target is aten.cat.default:
        parts: Any = node.args[0]
        joined = node.args[1:] == (1,) and all(map(_is_plain, parts))
        return list(parts) if joined and all(x.args[2:] == parts[0].args[2:] for x in parts) else []
    return [node] if _is_plain(node) else []


def _is_plain(node: Any) -> bool:
    if not isinstance(node, Node) or node.target is not aten.convolution.default:
        return False
    bias, rest = node.args[2], node.args[6:]
    transposed, added, groups = cast("tuple[bool, list[int], int]", rest)
    return bool(bias is None and not transposed and not any(added) and groups == 1)


def _sources(parts: list[Node]) -> tuple[Node, Node] | None:
    """Return what the convolutions take, before images and channels are exchanged, or None."""
    found = [_exchanged([x.args[i] for x in parts]) for i in (0, 1)]
    if found[0] is None or found[1] is None:
        return None
    part: Any = parts[0]
    size, kernel, result = (x.meta["val"].shape[2:] for x in (found[0], part.args[1], part))
    fits = _is_size_of(kernel, size, result, *part.args[3:6])
    return (found[0], found[1]) if fits and kernel.numel() >= result.numel() else None


def _is_size_of(
    cotangent: Sequence[int], size: Sequence[int], weight: Sequence[int], *steps: Sequence[int]
) -> bool:
    """Return whether a convolution with a weight of this size has cotangents of this size.

    That is so for every second derivative; other programs may convolve with images and channels
    exchanged too.
    """
    if {*map(len, steps)} != {len(size)}:
        return False
    rows = zip(cotangent, size, weight, *steps)
    return all((n + 2 * p - d * (w - 1) - 1) // s + 1 == c for c, n, w, d, p, s in rows)


def _exchanged(slices: list[Any]) -> Node | None:
    """Return the tensor of which these are consecutive slices, before its dims are exchanged."""
    whole = slices[0]
    if len(slices) > 1:
        if any(x.target is not aten.slice.Tensor for x in slices):
            return None
        whole, sizes = slices[0].args[0], [x.meta["val"].shape[0] for x in slices]
        starts = [i * sizes[0] for i in range(len(slices))]
        if [x.args[:3] for x in slices] != [(whole, 0, start) for start in starts]:
            return None
        if any(x.args[4:] not in ((), (1,)) for x in slices):
            return None
        if {*sizes} != {sizes[0]} or sum(sizes) != whole.meta["val"].shape[0]:
            return None
    dims = [1, 0, *range(2, whole.meta["val"].ndim)]
    if whole.target is not aten.permute.default or list(whole.args[1]) != dims:
        return None
    source: Node = whole.args[0]
    return source


def _replace(graph: Any, node: Node, part: Node, x: Node, cotangent: Node) -> None:
    """Replace a node by the weight's gradient, for an input x and a cotangent."""
    _, _, _, stride, padding, dilation, _, none, _ = part.args
    value = node.meta["val"]
    channels, outputs, *kernel = value.shape
    groups = x.meta["val"].shape[1] // channels
    sizes = dilation, padding, stride  # torch exchanges stride and dilation
    given = {"dtype": value.dtype, "device": value.device}
    with graph.inserting_before(node):
        weight = graph.call_function(aten.full.default, ([outputs, channels, *kernel], 0), given)
        both = graph.call_function(
            aten.convolution_backward.default,
            (cotangent, x, weight, None, *sizes, False, none, groups, [False, True, False]),
        )
        found = graph.call_function(operator.getitem, (both, 1))
        dims = [1, 0, *range(2, value.ndim)]
        exchanged = graph.call_function(aten.permute.default, (found, dims))
    node.replace_all_uses_with(exchanged)
