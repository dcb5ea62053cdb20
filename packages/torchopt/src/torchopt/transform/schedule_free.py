# SPDX-License-Identifier: Apache-2.0
"""Averaging in the place of a step size schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.find_states import map_states, places
from torchopt.transform.validate import check_at_least_zero, check_fraction
from torchopt.tree import tree_flatten, tree_leaves, tree_unflatten

__all__ = ["ScheduleFreeState", "averaged_params", "schedule_free"]


class ScheduleFreeState(NamedTuple):
    """`z`: the base iterate; `x`: its average; `weight_sum`: of the average; `count`."""

    z: Any
    x: Any
    weight_sum: Any
    count: Any


@dataclass(frozen=True)
class ScheduleFree(LeafRule):
    """The last stage of a schedule-free optimizer."""

    lr: float | Tensor
    beta: float | Tensor
    weight_decay: float | Tensor
    warmup_steps: int
    leaf_fields: ClassVar[tuple[str, ...]] = ("z", "x", "weight_sum", "count")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("z", "x")
    reads_params: ClassVar[bool] = True

    def init_leaves(self, params: list[Tensor]) -> ScheduleFreeState:
        """Return iterates equal to the parameters."""
        return ScheduleFreeState(
            z=[p.clone() for p in params],
            x=[p.clone() for p in params],
            weight_sum=[torch.zeros((), dtype=torch.float64, device=p.device) for p in params],
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the way from y to the next y."""
        counts = increment(state.count)
        zs, xs, sums, updates = [], [], [], []
        for u, y, z, x, total, count in zip(
            grads, params, state.z, state.x, state.weight_sum, counts
        ):
            k = count.to(torch.float64)
            lr = self.lr * (k / max(self.warmup_steps, 1)).clamp(max=1.0)
            total = total + lr * lr
            share = torch.where(total > 0, lr * lr / torch.where(total > 0, total, 1.0), 0.0)
            step, share = lr.to(u.dtype), share.to(u.dtype)
            z = z - step * (u + self.weight_decay * y)
            x = x + share * (z - x)
            updates.append(z + self.beta * (x - z) - y)
            zs.append(z)
            xs.append(x)
            sums.append(total)
        return updates, ScheduleFreeState(z=zs, x=xs, weight_sum=sums, count=counts)


@transformation
def schedule_free(
    lr: float | Tensor = 1.0,
    beta: float | Tensor = 0.9,
    weight_decay: float | Tensor = 0.0,
    warmup_steps: int = 0,
) -> LeafRule:
    r"""Return the last stage of schedule-free optimizers, in the place of the step size.

    .. math::
        z' = z - \gamma_k (u + \lambda y), \quad
        c_k = \gamma_k^2 / \sum_{i \le k} \gamma_i^2, \quad
        x' = (1 - c_k) x + c_k z', \quad y' = (1 - \beta) z' + \beta x'

    with :math:`\gamma_k = \gamma \min(1, k / w)`. The parameters are y, where gradients are taken;
    the model to use is x, see `averaged_params`.

    Args:
        lr: gamma, >= 0.
        beta: In [0, 1).
        weight_decay: lambda, >= 0.
        warmup_steps: w; 0 for none.

    Raises:
        ValueError: A hyper-parameter out of range.
        AssertionError: From `update`, when it is called without `params`.

    References:
        A. Defazio et al., The Road Less Scheduled, 2024, https://arxiv.org/abs/2405.15682,
        Algorithm 1.
    """
    check_at_least_zero(lr, "learning rate")
    check_fraction(beta, "beta value")
    check_at_least_zero(weight_decay, "weight_decay value")
    check_at_least_zero(warmup_steps, "warmup_steps value")
    return ScheduleFree(lr, beta, weight_decay, warmup_steps)


def averaged_params(state: Any, params: Any, *, where: Any = None) -> Any:
    """Return the averages x in the state of a schedule-free optimizer, as a tree like `params`.

    A parameter that the schedule-free optimizer does not step, inside `masked` or `partition`, is
    returned as it is.

    Args:
        state: The state of the optimizer, or of one that contains it.
        params: The parameters.
        where: Tree of bools, a prefix of `params`, or a function that returns one: which leaves
            the schedule-free optimizer has. Needed inside `masked` and `partition` where the
            shapes leave it open.

    Raises:
        ValueError: There is no such state in `state`, or it cannot be told whose averages it has.

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

    found = map_states(state, ScheduleFreeState, fill)[1]
    if not found:
        raise ValueError(
            "averaged_params: expected the state of a schedule-free optimizer, got another"
        )
    return tree_unflatten(spec, leaves)
