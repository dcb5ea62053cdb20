# SPDX-License-Identifier: Apache-2.0
"""Sophia's direction: a moving average over the curvature, clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.find_states import map_states, places
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import are_numbers, check_at_least_zero, check_betas
from torchopt.tree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["ScaleBySophiaState", "observe_curvature", "scale_by_sophia"]


class ScaleBySophiaState(NamedTuple):
    """`mu`: average of the gradient; `h`: average of the curvature; `count`: steps of each leaf."""

    mu: Any
    h: Any
    count: Any


@dataclass(frozen=True)
class ScaleBySophia(LeafRule):
    """u = clip(mu / max(rho h, eps), 1)."""

    b1: float | Tensor
    b2: float | Tensor
    rho: float | Tensor
    eps: float | Tensor
    batch_size: float | Tensor
    update_every: int | None
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "h", "count")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "h")

    def init_leaves(self, params: list[Tensor]) -> ScaleBySophiaState:
        """Return averages of zero."""
        return ScaleBySophiaState(
            mu=zeros_like(params, False), h=zeros_like(params, False), count=zero_counts(params)
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        counts = increment(state.count)
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        h = state.h
        if self.update_every is not None:
            h = [
                torch.where(
                    (count - 1) % self.update_every == 0,
                    moving_average(h, self.batch_size * g * g, self.b2),
                    h,
                )
                for g, h, count in zip(grads, state.h, counts)
            ]
        updates = [(m / (self.rho * c).clamp(min=self.eps)).clamp(-1.0, 1.0) for m, c in zip(mu, h)]
        return updates, ScaleBySophiaState(mu=mu, h=h, count=counts)


@transformation
def scale_by_sophia(
    b1: float | Tensor = 0.965,
    b2: float | Tensor = 0.99,
    rho: float | Tensor = 0.04,
    eps: float | Tensor = 1e-15,
    batch_size: float | Tensor = 1.0,
    update_every: int | None = 10,
) -> LeafRule:
    r"""Return the transformation to Sophia's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad h' = b_2 h + (1 - b_2) \hat h, \quad
        u = \mathrm{clip}\!\left(\frac{\mu'}{\max(\rho h', \epsilon)}, 1\right)

    with an estimate of the Hessian's diagonal, new in every `update_every`-th step: here
    :math:`\hat h = B g^2`, the Gauss-Newton-Bartlett estimator when g is the gradient for labels
    drawn from the model, and the empirical Fisher matrix otherwise. For another estimate, such as
    Hutchinson's :math:`z \odot H z`, give `update_every=None` and call `observe_curvature`.

    The derivative of clipped entries is zero.

    Args:
        b1: Decay of the average of the gradient, in [0, 1).
        b2: Decay of the average of the curvature, in [0, 1).
        rho: Curvature is scaled by it, >= 0; the larger, the fewer entries are clipped.
        eps: Smallest curvature, > 0.
        batch_size: B, the number of examples that the gradient is a mean over.
        update_every: Steps from one estimate to the next; None: only `observe_curvature` adds any.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        H. Liu et al., Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
        Pre-training, 2023, https://arxiv.org/abs/2305.14342, Algorithms 2 and 3.

    Example:
        >>> direction = scale_by_sophia(b1=0.0, b2=0.0, rho=1.0)
        >>> g = torch.tensor([4.0, 0.5])
        >>> direction.update(g, direction.init(g))[0]  # g / g^2, clipped
        tensor([0.2500, 1.0000])
    """
    check_betas(b1, b2)
    check_at_least_zero(rho, "rho value")
    if are_numbers(eps) and not eps > 0:
        raise ValueError(f"Invalid epsilon value: {eps}")
    if are_numbers(batch_size) and not batch_size > 0:
        raise ValueError(f"Invalid batch_size value: {batch_size}")
    if update_every is not None and are_numbers(update_every) and not update_every >= 1:
        raise ValueError(f"Invalid update_every value: {update_every}")
    return ScaleBySophia(b1, b2, rho, eps, batch_size, update_every)


def observe_curvature(
    state: Any, estimate: Any, b2: float | Tensor = 0.99, *, where: Any = None
) -> Any:
    """Return the state of an optimizer with Sophia's direction after h' = b2 h + (1 - b2) estimate.

    Args:
        state: The state of `torchopt.alias.sophia` or of one that contains `scale_by_sophia`.
        estimate: An estimate of the diagonal of the Hessian, a tree like the parameters; None for
            a parameter leaves its average as it is.
        b2: Decay of the average, in [0, 1).
        where: Tree of bools, a prefix of the parameters, or a function that returns one: which
            leaves Sophia has. Needed inside `masked` and `partition` where the shapes leave it
            open.

    Raises:
        ValueError: There is no such state in `state`, or it cannot be told whose curvature it has.

    Example:
        >>> from torchopt.alias import sophia
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> state = sophia(update_every=None).init(params)
        >>> state = observe_curvature(state, {"w": torch.tensor([3.0, 4.0])}, b2=0.5)
        >>> state[0].h
        [tensor([1.5000, 2.0000])]
    """
    leaves = tree_leaves(estimate, none_is_leaf=True)

    def observe(node: ScaleBySophiaState) -> ScaleBySophiaState:
        old, spec = tree_flatten(node.h, none_is_leaf=True)
        own = [leaves[i] for i in places(old, estimate, where, "observe_curvature")]
        new = [h if x is None else moving_average(h, x, b2) for h, x in zip(old, own)]
        return node._replace(h=tree_unflatten(spec, new))

    state, found = map_states(state, ScaleBySophiaState, observe)
    if not found:
        raise ValueError("observe_curvature: expected the state of Sophia, got another")
    return state
