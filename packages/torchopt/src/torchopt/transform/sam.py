# SPDX-License-Identifier: Apache-2.0
"""Sharpness-aware minimization: step with the gradient at the worst point nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation, require_transformation
from torchopt.kernels.reference.formulas import root
from torchopt.params.sharded import largest_absolute
from torchopt.precision import dense
from torchopt.transform.base import Wrapper
from torchopt.transform.leaf_rule import as_of_now
from torchopt.transform.norm import power_of_two
from torchopt.transform.validate import check
from torchopt.tree import (
    flatten_up_to,
    require_same_shapes,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

__all__ = ["SamState", "sam"]


class SamState(NamedTuple):
    """`climbed`: whether the parameters are at p + epsilon; `climb`: epsilon; `inner_state`."""

    climbed: bool
    climb: Any
    inner_state: Any

    @staticmethod
    def exact_fields() -> tuple[str, ...]:
        """Return the fields that `in_8_bits` leaves as they are."""
        return ("climb",)


@dataclass(frozen=True)
class Sam(Wrapper):
    """Moves to p + epsilon with one gradient, and steps `inner` from p with the next one."""

    rho: float | Tensor

    def init(self, params: Any) -> SamState:
        empty = tree_map(lambda p: None, params, none_is_leaf=True)
        return SamState(climbed=False, climb=empty, inner_state=self.inner.init(params))

    def step(self, updates: Any, state: Any, params: Any, inplace: bool) -> tuple[Any, Any]:
        """Return epsilon, or the step minus epsilon."""
        if not state.climbed:
            climb = self._climb(tree_map(dense, updates))
            # The caller may write to the updates.
            way = tree_map(lambda e: None if e is None else e.clone(), climb, none_is_leaf=True)
            return way, SamState(True, climb, state.inner_state)
        require_same_shapes(state.climb, updates, "sam: a gradient like the one before")

        stepped, inner_state = self.inner.update(
            updates, state.inner_state, params=_below(params, state.climb), inplace=inplace
        )

        def down(e: Any, u: Any) -> Any:
            return u if e is None else (-e if u is None else dense(u) - e)

        empty = tree_map(lambda e: None, state.climb, none_is_leaf=True)
        return tree_map(down, state.climb, stepped, none_is_leaf=True), SamState(
            False, empty, inner_state
        )

    def _climb(self, grads: Any) -> Any:
        leaves = [g for g in tree_leaves(grads) if isinstance(g, Tensor) and g.numel()]
        if not leaves:
            return grads
        device = leaves[0].device
        tops = [largest_absolute(g).to(device=device, dtype=torch.float64) for g in leaves]
        size = power_of_two(torch.stack(tops).amax())
        units = [g / size.to(device=g.device) for g in leaves]
        squares = [(x * x.conj()).real.to(torch.float64).sum().to(device) for x in units]
        norm = root(torch.stack(squares).sum())
        rho = as_of_now(self.rho)
        norm = torch.where(norm > 0, norm, 1.0)

        def climb(g: Any) -> Any:
            if g is None:
                return None
            factor = (rho / norm).to(device=g.device)
            return (g / size.to(device=g.device) * factor).to(g.dtype)

        return tree_map(climb, grads, none_is_leaf=True)


def _below(params: Any, climb: Any) -> Any:
    """Return the parameters before the climb."""
    if params is None:
        return None
    steps, spec = tree_flatten(climb, none_is_leaf=True)
    what = "update(updates, state, params=params)"
    pairs = zip(flatten_up_to(spec, params, what, spec_of="updates"), steps)
    return tree_unflatten(spec, [p if p is None or e is None else p - e for p, e in pairs])


def sam(inner: GradientTransformation, rho: float | Tensor = 0.05) -> GradientTransformation:
    r"""Return sharpness-aware minimization with the steps of `inner`: two gradients per step.

    .. math::
        \epsilon = \rho\, g(p) / |g(p)|, \qquad p' = p + \mathrm{inner}(g(p + \epsilon))

    Calls alternate. The update of the first call moves the parameters to p + epsilon, where the
    caller computes the next gradient. The update of the second call moves them back and steps
    `inner`. Evaluate and save the model after a second call.

    The norm is that of all gradients together. The derivative is exact, also through epsilon. If
    all gradients are zero, epsilon and its derivative are zero. Parameters without a gradient do
    not move to p + epsilon.

    Args:
        inner: The optimizer, which gets the parameters p.
        rho: The radius, >= 0; a tensor is differentiated.

    Raises:
        ValueError: A negative `rho`; from `update`, if the two gradients differ in shape.

    References:
        P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur, Sharpness-Aware Minimization for Efficiently
        Improving Generalization, 2021, https://arxiv.org/abs/2010.01412, Algorithm 1.

    Example:
        >>> import torch, torchopt
        >>> optimizer = sam(torchopt.sgd(0.5), rho=0.1)
        >>> p = torch.tensor([1.0])
        >>> state = optimizer.init(p)
        >>> for _ in range(2):
        ...     u, state = optimizer.update(2 * p, state, params=p, inplace=False)
        ...     p = p + u
        >>> p  # 1 - 0.5 * 2 * 1.1
        tensor([-0.1000])
    """
    check(rho, "a number >= 0", "rho value")
    require_transformation(inner, "sam(inner, rho)")
    return Sam(inner, rho).pair()
