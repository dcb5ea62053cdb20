# SPDX-License-Identifier: Apache-2.0
"""How the results of many calls become the result of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.distributed.partition import Call
from torchopt.tree import tree_leaves, tree_map

__all__ = ["WeightedReducer", "mean_reducer", "sum_reducer", "weighted_mean_reducer"]


def mean_reducer(results: Iterable[Tensor]) -> Tensor:
    """Return the mean of the results, each counting once, however many entries it stands for.

    Unequal parts make it a mean of means: see `weighted_mean_reducer`.

    Example:
        >>> mean_reducer([torch.tensor(1.0), torch.tensor(2.0)])
        tensor(1.5000)
    """
    return _stacked(results, "mean_reducer").mean(dim=0)


def sum_reducer(results: Iterable[Tensor]) -> Tensor:
    """Return the sum of the results.

    Example:
        >>> sum_reducer([torch.tensor(1.0), torch.tensor(2.0)])
        tensor(3.)
    """
    return _stacked(results, "sum_reducer").sum(dim=0)


def _stacked(results: Iterable[Tensor], name: str) -> Tensor:
    tensors = tuple(results)
    if not tensors:
        raise ValueError(
            f"{name}: expected at least one result, got none; the batch that was split is empty"
        )
    return torch.stack(tensors, dim=0)


class WeightedReducer:
    """A reducer that weights each result by the number of entries it stands for.

    Where the results come from calls that a partitioner made, `remote_async_call` and `parallelize`
    call `bind(calls)` and use what it returns.

    Args:
        weigh: From a call to its weight, > 0; None: the size of the first tensor of its arguments
            in dimension `dim`.
        dim: The dimension that was split.
    """

    def __init__(self, weigh: Callable[[Call], float] | None = None, *, dim: int = 0) -> None:
        self.weigh = weigh
        self.dim = dim

    def bind(self, calls: Sequence[Call]) -> Callable[[Iterable[Any]], Any]:
        """Return the reducer for the results of these calls."""
        weights = [float(self._weight(call)) for call in calls]
        return lambda results: self(results, weights)

    def _weight(self, call: Call) -> float:
        if self.weigh is not None:
            return self.weigh(call)
        for leaf in tree_leaves((call[1], call[2])):
            if isinstance(leaf, Tensor) and -leaf.ndim <= self.dim < leaf.ndim:
                return leaf.shape[self.dim]
        return 1

    def __call__(self, results: Iterable[Any], weights: Sequence[float] | None = None) -> Any:
        """Return sum_i w_i r_i / sum_i w_i of results that are tensors, or trees of tensors.

        Args:
            results: Of the calls.
            weights: Of each result; without them the results count alike.

        Raises:
            ValueError: There are no results, or another number of weights.
        """
        results = list(results)
        weights = [1.0] * len(results) if weights is None else list(weights)
        if not results or len(results) != len(weights):
            raise ValueError(
                f"weighted_mean_reducer: expected one weight a result and at least one result, "
                f"got {len(results)} results and {len(weights)} weights"
            )
        total = sum(weights)

        def mean(*parts: Tensor) -> Tensor:
            value = parts[0] * (weights[0] / total)
            for part, weight in zip(parts[1:], weights[1:]):
                value = value + part * (weight / total)
            return value

        return tree_map(mean, *results)


#: The mean over entries, whatever the sizes of the parts: each result is the mean of its part.
weighted_mean_reducer = WeightedReducer()
