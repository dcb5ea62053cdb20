# SPDX-License-Identifier: Apache-2.0
"""A batch of tasks as one program: which dimension counts them, and functions of one task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchopt.torch_internals import vmap_lists
from torchopt.tree import tree_flatten, tree_unflatten

__all__ = ["batched", "task_count", "tasks_in_front"]


def task_count(inputs: Any, fields: dict[str, Any]) -> int:
    """Return the number of tasks of the inputs."""
    by_step = {h.index for h in fields["batches"][0].holes() if h.by_step}
    sizes: dict[int, tuple[int, ...]] = {}
    for i, (x, dim) in enumerate(zip(inputs.tensors, inputs.dims)):
        if dim is None:
            continue
        shape = x.shape[1:] if i in by_step else x.shape
        if not -len(shape) <= dim < len(shape):
            raise ValueError(
                f"inner_loop: tasks: expected a tensor with a dimension {dim} for the tasks, got "
                f"one of shape {tuple(shape)}."
            )
        sizes.setdefault(shape[dim], tuple(shape))
    if len(sizes) != 1:
        shown = " and ".join(f"{n} (of shape {s})" for n, s in list(sizes.items())[:2])
        raise ValueError(
            "inner_loop: tasks: expected the same number of tasks in every tensor that has a "
            f"dimension of them, got {shown or 'no such tensor'}."
        )
    return int(next(iter(sizes)))


def tasks_in_front(leaves: Sequence[Any], dims: Sequence[Any], tasks: int) -> list[Any]:
    """Return leaves whose first dimension counts the tasks; a shared one is expanded."""
    return [
        x
        if not isinstance(x, Tensor)
        else x.expand(tasks, *x.shape)
        if dim is None
        else x.movedim(dim, 0)
        for x, dim in zip(leaves, dims)
    ]


def batched(
    function: Callable[[list[Any]], Any], leaves: Sequence[Any], dims: Sequence[Any]
) -> Any:
    """Return `function(leaves)` under vmap; leaves other than tensors bypass it.

    Args:
        function: Maps the leaves of one task to a tree.
        leaves: The leaves of all tasks.
        dims: For each of them, the dimension that counts the tasks, or None.
    """
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    form: list[Any] = []

    def of_tensors(tensors: list[Tensor]) -> list[Tensor]:
        filled = list(leaves)
        for i, x in zip(where, tensors):
            filled[i] = x
        out, spec = tree_flatten(function(filled), none_is_leaf=True)
        form[:] = [None if isinstance(x, Tensor) else (x,) for x in out], spec
        return [x for x in out if isinstance(x, Tensor)]

    results = iter(vmap_lists(of_tensors, [leaves[i] for i in where], [dims[i] for i in where]))
    others, spec = form
    return tree_unflatten(spec, [next(results) if x is None else x[0] for x in others])
