# SPDX-License-Identifier: Apache-2.0
"""Schedule-free optimizers: averages of the iterates replace a schedule of the step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.optimizers.adam import Adam
from torchopt.optimizers.stages import compose, flip_sign_and_add_weight_decay
from torchopt.transform.base import transformation_of
from torchopt.transform.find_states import map_states, places
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.transform.validate import unpacked
from torchopt.tree import tree_flatten, tree_leaves, tree_unflatten

__all__ = [
    "ScheduleFreeState",
    "averaged_params",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_sgd",
]


class ScheduleFreeState(NamedTuple):
    """`z`: the base iterate; `x`: its average; `weight_sum`: sum of its weights; `count`."""

    z: Any
    x: Any
    weight_sum: Any
    count: Any


@dataclass(frozen=True)
class ScheduleFree(Rule):
    """The last stage of a schedule-free optimizer: u = y' - y, from y to the next y."""

    lr: Hyper = at_least_zero("learning rate", 1.0)
    beta: Hyper = fraction("beta value", 0.9)
    weight_decay: Hyper = at_least_zero("weight_decay value", 0.0)
    warmup_steps: int = at_least_zero("warmup_steps value", 0)
    State = ScheduleFreeState
    shared: ClassVar[dict[str, float]] = {"weight_sum": 0.0}
    reads_params = True

    def _step_size(self, k: Tensor) -> Any:
        return self.lr * (k.to(torch.float64) / max(self.warmup_steps, 1)).clamp(max=1.0)

    def following(self, k: Tensor, *shared: Tensor) -> tuple[Tensor, ...]:
        """Return the sum of squared step sizes."""
        lr = self._step_size(k)
        return (shared[0] + lr * lr,)

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        """Return the step size and the share of the next iterate in the average."""
        lr, (total,) = self._step_size(k), self.following(k, *shared)
        return lr, torch.where(total > 0, lr * lr / torch.where(total > 0, total, 1.0), 0.0)

    def start(self, role: str, params: list[Tensor]) -> list[Tensor]:
        return [p.clone() for p in params]

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        """Return the difference to the next y, and the iterates."""
        step, share = c
        z, x = state
        z = z - step * (g + self.weight_decay * p)
        x = x + share * (z - x)
        return z + self.beta * (x - z) - p, (z, x)


@transformation_of(ScheduleFree)
def schedule_free() -> None:
    r"""Return the last stage of schedule-free optimizers, which replaces the step size.

    .. math::
        z' = z - \gamma_k (u + \lambda y), \quad
        c_k = \gamma_k^2 / \sum_{i \le k} \gamma_i^2, \quad
        x' = (1 - c_k) x + c_k z', \quad y' = (1 - \beta) z' + \beta x'

    with :math:`\gamma_k = \gamma \min(1, k / w)`. The parameters are y, at which gradients are
    taken. Evaluate the model at x; see `averaged_params`. The update y' - y includes the minus
    sign.

    Args:
        lr: gamma, the step size, >= 0.
        beta: Weight of the average in the point at which gradients are taken, in [0, 1).
        weight_decay: lambda, the coefficient of the decay, >= 0.
        warmup_steps: w, the number of steps in which the step size grows; 0 for none.

    References:
        A. Defazio et al., The Road Less Scheduled, 2024, https://arxiv.org/abs/2405.15682,
        Algorithm 1.

    Example:
        >>> import torch
        >>> stage = schedule_free(lr=0.5, beta=0.0)
        >>> p, g = torch.tensor([1.0]), torch.tensor([1.0])
        >>> stage.update(g, stage.init(p), params=p)[0]
        tensor([-0.5000])
    """


def averaged_params(state: Any, params: Any, *, where: Any = None) -> Any:
    """Return the averages x in the state of a schedule-free optimizer, as a tree like `params`.

    Parameters that the schedule-free optimizer does not step, because of `masked` or `partition`,
    are returned unchanged.

    Args:
        state: The state of the optimizer, or of one that contains it.
        params: The parameters.
        where: The leaves that the schedule-free optimizer steps: a tree of bools that is a prefix
            of `params`, or a function that returns one. It is needed inside `masked` and
            `partition` if the shapes do not determine the leaves.

    Raises:
        ValueError: `state` has no such state, or it is not clear to which leaves it belongs.

    Example:
        >>> from torchopt.alias import schedule_free_sgd
        >>> params = {"w": torch.ones(2)}
        >>> averaged_params(schedule_free_sgd(0.1).init(params), params)
        {'w': tensor([1., 1.])}
    """
    leaves, spec = tree_flatten(params, none_is_leaf=True)

    def fill(node: ScheduleFreeState) -> ScheduleFreeState:
        values = tree_leaves(node.x, none_is_leaf=True)
        for i, x in zip(places(values, params, where, "averaged_params"), values):
            leaves[i] = x
        return node

    refused = "averaged_params: expected the state of a schedule-free optimizer"
    map_states(state, ScheduleFreeState, fill, refused)
    return tree_unflatten(spec, leaves)


@documented(schedule_free)
def schedule_free_sgd(
    lr: float | Tensor = 1.0,
    beta: float = 0.9,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return schedule-free SGD.

    See `torchopt.transform.schedule_free`; `torchopt.transform.averaged_params` returns the model.
    """
    return compose(
        flip_sign_and_add_weight_decay.rule(0.0, maximize),
        ScheduleFree(lr, beta, weight_decay, warmup_steps),
        name="schedule_free_sgd",
    )


@documented(schedule_free)
def schedule_free_adamw(
    lr: float | Tensor = 2.5e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return schedule-free AdamW.

    See `torchopt.transform.schedule_free`; `torchopt.transform.averaged_params` returns the model.

    Args:
        betas: Weight of the average in the point where gradients are taken, and decay of the
            second moment, both in [0, 1).
    """
    b1, b2 = unpacked(betas, "betas", (0.9, 0.999))
    return compose(
        flip_sign_and_add_weight_decay.rule(0.0, maximize),
        # Without a first moment: u = g / (sqrt(nu / (1 - b2^k)) + eps).
        Adam(0.0, b2, eps, 0.0),
        ScheduleFree(lr, b1, weight_decay, warmup_steps),
        name="schedule_free_adamw",
    )
