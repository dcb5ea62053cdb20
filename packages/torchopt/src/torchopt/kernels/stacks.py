# SPDX-License-Identifier: Apache-2.0
"""Stacks of tensors of one shape: one call for the products of many small matrices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.tree_function import Operation, any_watched, apply_operation, is_batched, is_traced

__all__ = ["in_rows", "in_stacks", "stacks"]

_CACHE = 1 << 20
_MEMORY = 1 << 28


def stacks(tensors: Sequence[Tensor], keys: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Return groups of indices of tensors that can be stacked.

    The tensors of a group agree in shape, dtype, device, key, and in the ranks that hold them. On
    the CPU a stack is at most as large as the cache of a core (benchmarks/torchopt/matrices.py).

    Args:
        tensors: Tensors of any shapes.
        keys: One key for each tensor; only tensors with equal keys are stacked.
    """
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(tensors):
        ranks = getattr(x, "placements", None), getattr(x, "device_mesh", None)
        key = (x.shape, x.dtype, x.device, *ranks, None if keys is None else keys[i])
        groups.setdefault(key, []).append(i)
    out = []
    for group in groups.values():
        x = tensors[group[0]]
        limit = _CACHE if x.device.type == "cpu" else _MEMORY
        size = max(1, limit // max(1, x.numel() * x.element_size()))
        out += [group[i : i + size] for i in range(0, len(group), size)]
    return out


def in_rows(
    function: Callable[..., Sequence[Tensor]],
    roles: Sequence[Sequence[Tensor]],
    keys: Sequence[Hashable] | None = None,
) -> list[list[Tensor]]:
    """Return the outputs of `function`, computed on stacks of leaves of one shape.

    Args:
        function: Takes the index of the first leaf of a group and, for each role, a stack
            `[k, *shape]` of the tensors of the group; returns stacks.
        roles: For each role, one tensor for each leaf. Leaves whose tensors can be stacked in the
            first role must have tensors that can be stacked in the others.
        keys: See `stacks`.

    Returns:
        For each output, a list with one tensor for each leaf.
    """
    rows: list[tuple[Tensor, ...]] = [()] * len(roles[0])
    for indices in stacks(roles[0], keys):
        stacked = (torch.stack([role[i] for i in indices]) for role in roles)
        values = (value.unbind() for value in function(indices[0], *stacked))
        for i, row in zip(indices, zip(*values)):
            rows[i] = tuple(x.clone() for x in row)  # not views
    return [list(column) for column in zip(*rows)] or [[] for _ in roles]


def in_stacks(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    *hypers: Any,
    kernel: Callable[[list[Tensor]], Sequence[Tensor | None] | None] | None = None,
) -> list[Tensor]:
    """Return the rows of `function(stack, *hypers)`, one for each tensor.

    The tensors of one shape are stacked to `[k, *shape]`. The derivative computes the function
    again, so only the tensors are saved for it. It is exact to any order, also with respect to
    `hypers` that are tensors.

    Args:
        function: Takes a stack and the hypers; returns a stack.
        tensors: Tensors of any shapes.
        *hypers: Numbers, or tensors with derivatives.
        kernel: Computes the same values for a list of plain tensors; None (or None for one of the
            tensors) if it does not support them.
    """
    learned = [h for h in hypers if isinstance(h, Tensor)]
    known = None if kernel is None else kernel(list(tensors))
    out: list[Any] = [None] * len(tensors) if known is None else list(known)
    waiting = [i for i, x in enumerate(out) if x is None]
    for group in stacks([tensors[i] for i in waiting]):
        indices = [waiting[i] for i in group]
        chunk = [tensors[i] for i in indices]

        def call(*given: Tensor, size: int = len(chunk)) -> tuple[Tensor, ...]:
            rest = iter(given[size:])
            numbers = [next(rest) if isinstance(h, Tensor) else h for h in hypers]
            parts = function(torch.stack(given[:size]), *numbers).unbind()
            # Not views, like the results of the kernel.
            return parts if kernel is None else tuple(x.clone() for x in parts)

        def fast(*given: Tensor, slow: Callable[..., tuple[Tensor, ...]] = call) -> Any:
            found = None if kernel is None else kernel(list(given))
            if found is None or any(x is None for x in found):
                return slow(*given)
            return tuple(found)

        inputs = (*chunk, *learned)
        if _keeps_inputs_only(inputs):
            values = apply_operation(Operation(fast, None, call, len(inputs)), *inputs)
        else:
            values = call(*inputs)
        for i, value in zip(indices, values):
            out[i] = value
    return out


def _keeps_inputs_only(inputs: Sequence[Tensor]) -> bool:
    # Under vmap an operation would run once for each entry, while torch batches a plain function.
    return not is_traced() and any_watched(inputs) and not any(map(is_batched, inputs))
