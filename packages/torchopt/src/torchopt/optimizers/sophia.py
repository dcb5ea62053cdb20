# SPDX-License-Identifier: Apache-2.0
"""Sophia: the averaged gradient divided by the averaged curvature, clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import moving_average
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.find_states import map_states, places
from torchopt.transform.in_8_bits import is_coded
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction, positive
from torchopt.transform.validate import at_least_one
from torchopt.tree import tree_flatten, tree_leaves, tree_unflatten
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleBySophiaState", "observe_curvature", "scale_by_sophia", "sophia"]


class ScaleBySophiaState(NamedTuple):
    """`mu`: average of the gradient; `h`: average of the curvature; `count`: steps of each leaf."""

    mu: Any
    h: Any
    count: Any


@dataclass(frozen=True)
class Sophia(Rule):
    """u = clip(mu' / max(rho h', eps), 1)."""

    b1: Hyper = fraction("beta parameter at index 0", 0.965)
    b2: Hyper = fraction("beta parameter at index 1", 0.99)
    rho: Hyper = at_least_zero("rho value", 0.04)
    eps: Hyper = positive("epsilon value", 1e-15)
    batch_size: Hyper = positive("batch_size value", 1.0)
    update_every: int | None = at_least_one("update_every value", 10, optional=True)
    State = ScaleBySophiaState

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        """Return whether the curvature is estimated in this step; None means never."""
        return (None if self.update_every is None else (k - 1) % self.update_every == 0,)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu, h = state
        mu = moving_average(mu, g, self.b1)
        if c[0] is not None:
            h = torch.where(c[0], moving_average(h, self.batch_size * g * g, self.b2), h)
        return (mu / (self.rho * h).clamp(min=self.eps)).clamp(-1.0, 1.0), (mu, h)


@transformation_of(Sophia)
def scale_by_sophia() -> None:
    r"""Return the transformation that computes Sophia's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad h' = b_2 h + (1 - b_2) \hat h, \quad
        u = \mathrm{clip}\!\left(\frac{\mu'}{\max(\rho h', \epsilon)}, 1\right)

    with an estimate of the diagonal of the Hessian once in `update_every` steps. The estimate is
    :math:`\hat h = B g^2`. This is the Gauss-Newton-Bartlett estimator if g is the gradient for
    labels drawn from the model, and the empirical Fisher matrix otherwise. For another estimate,
    such as Hutchinson's :math:`z \odot H z`, pass `update_every=None` and call `observe_curvature`.

    The derivative of clipped entries is zero.

    Args:
        b1: Decay of the average of the gradient, in [0, 1).
        b2: Decay of the average of the curvature, in [0, 1).
        rho: Factor of the curvature, >= 0; the larger, the fewer entries are clipped.
        eps: Lower bound of the divisor, > 0.
        batch_size: B, > 0: g is the gradient of a mean over B examples.
        update_every: Number of steps between estimates of the curvature, >= 1; None for estimates
            by `torchopt.transform.observe_curvature` alone.

    References:
        H. Liu et al., Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
        Pre-training, 2023, https://arxiv.org/abs/2305.14342, Algorithms 2 and 3.

    Example:
        >>> direction = scale_by_sophia(b1=0.0, b2=0.0, rho=1.0)
        >>> g = torch.tensor([4.0, 0.5])
        >>> direction.update(g, direction.init(g))[0]  # g / g^2, clipped
        tensor([0.2500, 1.0000])
    """


def observe_curvature(
    state: Any, estimate: Any, b2: float | Tensor = 0.99, *, where: Any = None
) -> Any:
    """Return the state of an optimizer with Sophia's direction after h' = b2 h + (1 - b2) estimate.

    Args:
        state: The state of `torchopt.alias.sophia`, or of a chain that contains `scale_by_sophia`.
        estimate: An estimate of the diagonal of the Hessian, a tree like the parameters. None
            leaves the average of a parameter unchanged.
        b2: Decay of the average, in [0, 1).
        where: The leaves that Sophia steps: a tree of bools that is a prefix of the parameters, or
            a function that returns one. It is needed inside `masked` and `partition` if the shapes
            do not determine the leaves.

    Raises:
        ValueError: `state` has no such state, is in 8 bits, or it is not clear to which leaves it
            belongs.

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
        if any(map(is_coded, tree_leaves(node.h, is_leaf=is_coded))):
            raise ValueError(
                "observe_curvature: expected averages in full precision, got codes of in_8_bits; "
                "give in_8_bits to the other parameters alone, by masked or partition"
            )
        old, spec = tree_flatten(node.h, none_is_leaf=True)
        own = [leaves[i] for i in places(old, estimate, where, "observe_curvature")]
        new = [h if x is None else moving_average(h, x, b2) for h, x in zip(old, own)]
        return node._replace(h=tree_unflatten(spec, new))

    refused = "observe_curvature: expected the state of Sophia"
    return map_states(state, ScaleBySophiaState, observe, refused)


@documented(scale_by_sophia, weight_decay=DECOUPLED)
def sophia(
    lr: ScalarOrSchedule = 1e-4,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    weight_decay: float = 0.1,
    eps: float = 1e-15,
    batch_size: float = 1.0,
    update_every: int | None = 10,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Sophia.

    Args:
        betas: Decays of the averages of gradient and curvature, in [0, 1).
    """
    direction = Sophia.from_betas(betas, rho, eps, batch_size, update_every)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="sophia"
    )
