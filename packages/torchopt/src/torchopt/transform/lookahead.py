# SPDX-License-Identifier: Apache-2.0
"""Slow weights that follow fast ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.transform.base import Wrapper
from torchopt.transform.leaf_rule import as_of_now
from torchopt.transform.validate import check, require_params
from torchopt.tree import is_smooth, require_same_shapes, require_tensor_tree, tree_map

__all__ = ["LookaheadState", "lookahead"]


class LookaheadState(NamedTuple):
    """`steps`: fast steps since the last synchronization; `slow`: slow weights; `inner_state`."""

    steps: int
    slow: Any
    inner_state: Any


@dataclass(frozen=True)
class Lookahead(Wrapper):
    """Moves to the slow weights after every `every` steps of `inner`."""

    every: int
    alpha: float | Tensor

    def init(self, params: Any) -> LookaheadState:
        require_tensor_tree(params, "init(params): a parameter")
        slow = tree_map(lambda p: p.clone(), params)
        return LookaheadState(steps=0, slow=slow, inner_state=self.inner.init(params))

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Step `inner`; after every `every` steps, return to the new slow weights."""
        require_params(params, "lookahead")
        require_same_shapes(params, updates, "lookahead: a gradient like the parameter")
        require_same_shapes(params, state.slow, "lookahead: slow weights like the parameter")
        fast, inner_state = self.inner.update(
            updates, state.inner_state, params=params, inplace=inplace
        )
        steps = state.steps + 1
        if steps < self.every:
            return fast, LookaheadState(steps, state.slow, inner_state)

        alpha = as_of_now(self.alpha)

        def moved(slow: Any, p: Any, u: Any) -> Any:
            if not is_smooth(p):
                return slow
            ahead = slow + alpha * (p + (0 if u is None else u) - slow)
            return ahead.to(slow.dtype)  # a number of a wider dtype would widen 0-dim weights

        slow = tree_map(moved, state.slow, params, fast, none_is_leaf=True)
        # The new parameters must not share memory with the slow weights, as they may be written to.
        synced = tree_map(
            lambda s, p: s - p if is_smooth(p) else None, slow, params, none_is_leaf=True
        )
        return synced, LookaheadState(0, slow, inner_state)


def lookahead(
    inner: GradientTransformation, every: int = 5, alpha: float | Tensor = 0.5
) -> GradientTransformation:
    r"""Return lookahead around `inner`: k fast steps, then one step of the slow weights.

    After every k-th step :math:`\phi' = \phi + \alpha (\theta - \phi)` and
    :math:`\theta' = \phi'`, with the slow weights phi and the fast weights theta.

    Args:
        inner: The transformation of the fast steps.
        every: k, the number of fast steps, >= 1.
        alpha: Step size of the slow weights, in [0, 1]; a tensor is differentiated.

    Raises:
        ValueError: `every` or `alpha` is out of range.
        AssertionError: From `update`, when it is called without `params`.

    References:
        M. R. Zhang, J. Lucas, G. Hinton, J. Ba, Lookahead Optimizer: k steps forward, 1 step back,
        2019, https://arxiv.org/abs/1907.08610, Algorithm 1.

    Example:
        >>> import torch, torchopt
        >>> optimizer = lookahead(torchopt.sgd(1.0), every=2, alpha=0.5)
        >>> p = torch.tensor([0.0])
        >>> state = optimizer.init(p)
        >>> for _ in range(2):
        ...     u, state = optimizer.update(torch.tensor([1.0]), state, params=p, inplace=False)
        ...     p = p + u
        >>> p  # half of the way to -2
        tensor([-1.])
    """
    check(every, "an integer >= 1", "every value")
    check(alpha, "0 <= number <= 1", "alpha value")
    require_transformation(inner, "lookahead(inner, ...)")
    return Lookahead(inner, every, alpha).pair()
