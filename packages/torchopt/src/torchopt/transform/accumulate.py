# SPDX-License-Identifier: Apache-2.0
"""Accumulate the gradients of several calls for one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.precision import as_given, widened
from torchopt.transform.base import Wrapper
from torchopt.transform.validate import check
from torchopt.tree import require_same_shapes, tree_flatten, tree_leaves, tree_map, tree_unflatten

__all__ = ["AccumulateState", "accumulate"]


class AccumulateState(NamedTuple):
    """The state.

    Attributes:
        collected: Calls since the last step.
        mean: Their mean gradient, in float32 for half types.
        inner_state: The state of the transformation that steps.
        likes: Empty tensors in the dtypes of the parameters.
    """

    collected: int
    mean: Any
    inner_state: Any
    likes: Any


@dataclass(frozen=True)
class Accumulate(Wrapper):
    """Steps `inner` with the mean gradient of `every` calls."""

    every: int

    def init(self, params: Any) -> AccumulateState:
        empty = tree_map(lambda p: None, params, none_is_leaf=True)
        likes = tree_map(_empty, params, none_is_leaf=True)
        return AccumulateState(0, empty, self.inner.init(params), likes)

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Collect a gradient; step with each `every`-th one."""

        def added(g: Any, mean: Any) -> Any:
            if g is None:
                return mean
            share = widened(g) / self.every  # in half types, most shares would round to nothing
            return share if mean is None else mean + share

        empty = tree_map(lambda g: None, updates, none_is_leaf=True)
        before = empty  # a tuple of gradients may belong to a list of parameters
        if state.collected:
            before = state.mean
            require_same_shapes(before, updates, "accumulate: a gradient like the one before")
        mean = tree_map(added, updates, before, none_is_leaf=True)
        collected = state.collected + 1
        if collected < self.every:
            return empty, state._replace(collected=collected, mean=mean)
        means, spec = tree_flatten(mean, none_is_leaf=True)
        pairs = zip(*(tree_leaves(x, none_is_leaf=True) for x in (updates, state.likes)))
        likes = [like if g is None else g for g, like in pairs]
        stepped, inner_state = self.inner.update(
            tree_unflatten(spec, as_given(means, likes)),
            state.inner_state,
            params=params,
            inplace=inplace,
        )
        return stepped, AccumulateState(0, empty, inner_state, state.likes)


def _empty(x: Any) -> Tensor | None:
    return x.detach().new_empty(0) if isinstance(x, Tensor) else None


def accumulate(inner: GradientTransformation, every: int) -> GradientTransformation:
    """Return the transformation that steps once with the mean of `every` gradients.

    The calls in between return updates of None, which leave the parameters unchanged. A gradient of
    None counts as zero, unless it is None in all calls. The mean of gradients of half types is
    accumulated in float32 and rounded once.

    Args:
        inner: The transformation that steps.
        every: Number of gradients per step, >= 1.

    Raises:
        ValueError: `every` is not an integer >= 1.

    Example:
        >>> import torch, torchopt
        >>> optimizer = accumulate(torchopt.sgd(1.0), every=2)
        >>> state = optimizer.init((torch.zeros(1),))
        >>> first, state = optimizer.update((torch.tensor([1.0]),), state)
        >>> second, state = optimizer.update((torch.tensor([3.0]),), state)
        >>> first, second
        ((None,), (tensor([-2.]),))
    """
    check(every, "an integer >= 1", "every value")
    require_transformation(inner, "accumulate(inner, every)")
    return Accumulate(inner, every).pair()
