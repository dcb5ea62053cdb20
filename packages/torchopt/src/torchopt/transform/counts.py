# SPDX-License-Identifier: Apache-2.0
"""Step counts: a 0-dim int64 tensor per leaf; leaves that step together share one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["for_each_distinct", "increment", "shared_scalars", "zero_counts"]

T = TypeVar("T")


def zero_counts(params: list[Tensor]) -> list[Tensor]:
    """Return a zero count for each leaf."""
    return shared_scalars(params, 0)


def shared_scalars(
    leaves: Sequence[Any], value: float, dtype: torch.dtype = torch.int64
) -> list[Any]:
    """Return a 0-dim tensor for each leaf, None for None; leaves on one device share a tensor."""
    shared: dict[torch.device, Tensor] = {}
    return [
        None
        if x is None
        else shared.setdefault(x.device, torch.full((), value, dtype=dtype, device=x.device))
        for x in leaves
    ]


def increment(counts: list[Tensor]) -> list[Tensor]:
    """Return each count plus one, with one addition per distinct tensor.

    Leaves that had no gradient in a step hold another, older tensor.
    """
    return for_each_distinct(lambda count: count + 1, counts)


def for_each_distinct(function: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
    """Return `function(*row)` for each row of the columns, computed once per distinct row.

    Tensors are compared by identity. Leaves that step together share their count, so values that
    depend only on the count are computed once for all of them.
    """
    # The tensors themselves are the keys, because torch.compile would make a program that is for
    # one `id` alone.
    known: dict[tuple[Any, ...], T] = {}
    out = []
    for row in zip(*columns):
        if row not in known:
            known[row] = function(*row)
        out.append(known[row])
    return out
