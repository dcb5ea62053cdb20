# SPDX-License-Identifier: Apache-2.0
"""Combine the results of several calls into one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.distributed.partition import Call
from torchopt.tree import tree_leaves, tree_map

__all__ = ["WeightedReducer", "mean_reducer", "sum_reducer", "weighted_mean_reducer"]


def mean_reducer(results: Iterable[Tensor]) -> Tensor:
    """Return the mean of the results, each with the same weight.

    If the parts have different sizes, this is a mean of means; see `weighted_mean_reducer`.

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

    `remote_async_call` and `parallelize` call `bind(calls)` with the calls of the partitioner and
    use the reducer that it returns.

    Args:
        weigh: A function from a call to its weight, > 0; None: the size in dimension `dim` of the
            first tensor among its arguments.
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
        """Return sum_i w_i r_i / sum_i w_i for results r_i that are tensors or trees of tensors.

        Args:
            results: The results of the calls.
            weights: The weight of each result; None: all results have the same weight.

        Raises:
            ValueError: There are no results, or the number of weights is another one.
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


#: The mean over all entries if each result is the mean over its part, whatever the parts' sizes.
weighted_mean_reducer = WeightedReducer()
