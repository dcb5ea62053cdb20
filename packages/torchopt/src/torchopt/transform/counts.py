# SPDX-License-Identifier: Apache-2.0
"""Step counts: one 0-dim int64 tensor for each leaf, shared as long as the leaves step together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["for_each_distinct", "increment", "same_counts", "zero_counts"]

T = TypeVar("T")


def zero_counts(params: list[Tensor]) -> list[Tensor]:
    """Return a zero count for each leaf, one tensor object for each device."""
    return same_counts(params, 0)


def same_counts(leaves: Sequence[Any], value: int) -> list[Any]:
    """Return the count `value` for each leaf, one tensor object for each device; None for None."""
    shared: dict[torch.device, Tensor] = {}
    return [
        None
        if x is None
        else shared.setdefault(x.device, torch.full((), value, dtype=torch.int64, device=x.device))
        for x in leaves
    ]


def increment(counts: list[Tensor]) -> list[Tensor]:
    """Return each count plus one, with one addition for each distinct tensor.

    Leaves that missed a gradient hold an older tensor and stay behind.
    """
    following: dict[int, Tensor] = {}
    out = []
    for count in counts:
        following_count = following.get(id(count))
        if following_count is None:
            following_count = following[id(count)] = count + 1
        out.append(following_count)
    return out


def for_each_distinct(function: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
    """Return `function(*row)` for each row of the columns, computed once for the same objects.

    Leaves that step together share their count, so what depends only on it is computed once for
    all of them and not once for each.
    """
    known: dict[tuple[int, ...], T] = {}
    out = []
    for row in zip(*columns):
        key = tuple(map(id, row))
        if key not in known:
            known[key] = function(*row)
        out.append(known[key])
    return out
