# SPDX-License-Identifier: Apache-2.0
"""Split the arguments of one call into the arguments of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Union

from torch import Tensor

from torchopt.distributed.world import get_worker_id, get_world_rank, get_world_size
from torchopt.tree import tree_flatten, tree_unflatten

__all__ = [
    "Call",
    "PartitionFunction",
    "Partitioner",
    "TensorDimensionPartitioner",
    "batch_partitioner",
    "dim_partitioner",
    "exclusive_batch_partitioner",
]

#: (rank, args, kwargs): one call on one worker.
Call = tuple[int, Union[tuple[Any, ...], None], Union[dict[str, Any], None]]
PartitionFunction = Callable[..., Sequence[Call]]
Partitioner = Union[PartitionFunction, str, int]


class TensorDimensionPartitioner:
    """Splits every tensor in the arguments along one dimension, and repeats everything else.

    All tensors in the arguments must have the same size in that dimension. Modules, values of
    `torchopt.distributed.share` and numbers are repeated.

    Without `exclusive` there is one call for each worker, or for each entry if there are fewer
    entries than workers. Each call gets `size // workers` entries, and the last one also gets the
    remainder. The results can then represent different numbers of entries, which
    `weighted_mean_reducer` takes into account and `mean_reducer` does not.

    Args:
        dim: The dimension to split.
        exclusive: Make one call for each entry; the workers take turns.
        keepdim: Keep the dimension, of size 1, in exclusive calls.
        workers: Ranks or names of the workers to use; None: all.

    Raises:
        ValueError: `keepdim=False` without `exclusive`, or `workers` is empty; when called: tensors
            of different sizes.
        IndexError: When called: a tensor has no dimension `dim`.

    Example:
        >>> import torch
        >>> split = TensorDimensionPartitioner(0, keepdim=True, workers=[0, 1])
        >>> [(rank, args[0].tolist()) for rank, args, kwargs in split(torch.arange(5))]
        [(0, [0, 1]), (1, [2, 3, 4])]
    """

    def __init__(
        self,
        dim: int,
        *,
        exclusive: bool = False,
        keepdim: bool = False,
        workers: Sequence[int | str] | None = None,
    ) -> None:
        if not keepdim and not exclusive:
            raise ValueError("keepdim=False should be used with exclusive=True.")
        if workers is not None and len(workers) == 0:
            raise ValueError("`workers`: expected at least one worker, got none.")
        self.dim = dim
        self.exclusive = exclusive
        self.keepdim = keepdim
        self.workers = workers

    def __call__(self, *args: Any, **kwargs: Any) -> list[Call]:
        """Return the calls."""
        leaves, spec = tree_flatten((args, kwargs))
        size = self._size(leaves)
        if size is None:
            return [(get_world_rank(), args, kwargs)]
        if self.workers is None:
            workers = list(range(get_world_size()))
        else:
            workers = [get_worker_id(worker) for worker in self.workers]
        calls: list[Call] = []
        for number, entries in enumerate(self._parts(size, len(workers))):
            part: Any = tree_unflatten(
                spec, [self._take(x, entries) if isinstance(x, Tensor) else x for x in leaves]
            )
            calls.append((workers[number % len(workers)], *part))
        return calls

    def _size(self, leaves: Sequence[Any]) -> int | None:
        size: int | None = None
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue
            if not -leaf.ndim <= self.dim < leaf.ndim:
                raise IndexError(
                    f"expected tensors with a dimension {self.dim} to split, got one of shape "
                    f"{list(leaf.shape)}; pass what must not be split as a number, in a module, or "
                    "through torchopt.distributed.share"
                )
            if size is None:
                size = leaf.shape[self.dim]
            elif leaf.shape[self.dim] != size:
                raise ValueError(
                    f"Batch size mismatch on dim={self.dim}. Expected {size}, got "
                    f"{leaf.shape[self.dim]} (shape: {leaf.shape})."
                )
        return size

    def _parts(self, size: int, workers: int) -> list[tuple[int, int]]:
        """Return start and stop of the entries of each call."""
        if self.exclusive:
            return [(i, i + 1) for i in range(size)]
        count = min(size, workers)
        step = size // count if count else 0
        return [(i * step, (i + 1) * step if i < count - 1 else size) for i in range(count)]

    def _take(self, x: Tensor, entries: tuple[int, int]) -> Tensor:
        start, stop = entries
        if self.exclusive and not self.keepdim:
            return x.select(self.dim, start)
        return x.narrow(self.dim, start, stop - start)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        workers = None if self.workers is None else tuple(self.workers)
        return hash((self.dim, self.exclusive, self.keepdim, workers))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.dim}, exclusive={self.exclusive}, "
            f"keepdim={self.keepdim}, workers={self.workers})"
        )


def dim_partitioner(
    dim: int = 0,
    *,
    exclusive: bool = False,
    keepdim: bool = True,
    workers: Sequence[int | str] | None = None,
) -> PartitionFunction:
    """Return a partitioner that splits along `dim`; see `TensorDimensionPartitioner`.

    Example:
        >>> import torch
        >>> calls = dim_partitioner(1, workers=[0, 0])(torch.zeros(2, 3))
        >>> [tuple(args[0].shape) for _, args, _ in calls]
        [(2, 1), (2, 2)]
    """
    return TensorDimensionPartitioner(dim, exclusive=exclusive, keepdim=keepdim, workers=workers)


batch_partitioner = TensorDimensionPartitioner(0, keepdim=True)
exclusive_batch_partitioner = TensorDimensionPartitioner(0, exclusive=True, keepdim=True)
