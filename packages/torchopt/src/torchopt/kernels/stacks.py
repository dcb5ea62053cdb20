# SPDX-License-Identifier: Apache-2.0
"""Tensors of one shape together: one call for the products of many small matrices."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.tree_function import (
    Operation,
    any_watched,
    apply_operation,
    are_plain,
    is_batched,
    is_traced,
)

__all__ = ["in_rows", "in_stacks", "stacks"]

_CACHE = 1 << 20
_MEMORY = 1 << 28


def stacks(tensors: Sequence[Tensor], keys: Sequence[Hashable] | None = None) -> list[list[int]]:
    """Return the indices of tensors that can be stacked: of one shape, dtype, device and key, and
    on the same ranks.

    On the CPU a stack is no larger than the cache of a core (benchmarks/torchopt/matrices.py).

    Args:
        tensors: Any.
        keys: What else stacked tensors agree in, one for each tensor.
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
    """Return the outputs of `function`, each a list with one tensor for each leaf.

    Args:
        function: Takes the index of a leaf, and for each role a stack `[k, *shape]` of that leaf
            and of others like it; returns stacks.
        roles: For each role a tensor for each leaf, alike where the first role is.
        keys: See `stacks`.
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
    """Return `function(stack, *hypers)` for each tensor, with the tensors stacked to `[k, *shape]`.

    `kernel` gives the same values of a list of plain tensors, None for those that it does not take.

    The derivative computes the function again: the tensors are all that is kept for it. It is
    exact to any order, also with respect to `hypers` that are tensors.
    """
    out: list[Any] = [None] * len(tensors)
    learned = [h for h in hypers if isinstance(h, Tensor)]
    known = None
    if kernel is not None and are_plain(tensors) and not any_watched(tensors):
        known = kernel(list(tensors))
    if known is not None:
        out = list(known)
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
    # Under vmap the values of all entries are one tensor: an operation would run one by one.
    return not is_traced() and any_watched(inputs) and not any(map(is_batched, inputs))
