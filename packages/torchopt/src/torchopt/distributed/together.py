# SPDX-License-Identifier: Apache-2.0
"""Stack several tasks into one for `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.tree import tree_flatten, tree_unflatten

__all__ = ["stacked_tasks"]


def stacked_tasks(tasks: Sequence[Any], first: int) -> Any:
    """Return several trees of tensors as one tree, stacked along a new first dimension.

    Args:
        tasks: The trees.
        first: The number of the first task, for messages.

    Raises:
        TypeError: The trees differ in structure, shapes, dtypes or devices, or contain something
            other than tensors.
    """
    found = [tree_flatten(task, none_is_leaf=True) for task in tasks]
    start, spec = found[0]
    for i, (leaves, other) in enumerate(found, first + 1):
        if other != spec:
            raise _refused("trees of one structure", f"{str(other)[:80]}", f"task {i}")
        for k, (x, y) in enumerate(zip(leaves, start)):
            if not isinstance(x, Tensor):
                raise _refused("trees of tensors", type(x).__name__, _place(spec, k, i))
            if (x.shape, x.dtype, x.device) != (y.shape, y.dtype, y.device):
                want, got = (f"{list(t.shape)} {t.dtype} on {t.device}" for t in (y, x))
                raise _refused(f"{want}, as in task {first + 1}", got, _place(spec, k, i))
    columns = zip(*(leaves for leaves, _ in found))
    return tree_unflatten(spec, [torch.stack(column) for column in columns])


def _place(spec: Any, k: int, i: int) -> str:
    return f"task {i} at {spec.accessors()[k].codify('$')}"


def _refused(expected: str, got: str, place: str) -> TypeError:
    return TypeError(
        f"`tasks_at_once`: expected {expected}, got {got} in {place}; make the tasks alike, or "
        "take them one by one, tasks_at_once=1"
    )
