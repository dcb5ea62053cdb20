# SPDX-License-Identifier: Apache-2.0
"""Multiply updates by a function of the step count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import for_each_distinct, increment, zero_counts
from torchopt.transform.plan import Plan
from torchopt.typing import Schedule

__all__ = ["ScaleByScheduleState", "scale_by_schedule"]


class ScaleByScheduleState(NamedTuple):
    """`count`: how many updates each leaf has had, 0-dim int64 tensors."""

    count: Any


@dataclass(frozen=True)
class ScaleBySchedule(LeafRule):
    """u = sign * step_size_fn(count) * g, count from 0."""

    step_size_fn: Schedule
    sign: float = 1.0
    leaf_fields: ClassVar[tuple[str, ...]] = ("count",)
    keeps_sparse: ClassVar[bool] = True

    def hyper_parameters(self) -> dict[str, Any]:
        return {"lr": self.step_size_fn}

    def join(self, plan: Plan) -> Plan | None:
        return plan.scheduled(self.step_size_fn, self.sign)

    def init_leaves(self, params: list[Tensor]) -> ScaleByScheduleState:
        return ScaleByScheduleState(count=zero_counts(params))

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Evaluate the schedule once for each distinct count and scale."""

        def factor(count: Tensor) -> Any:
            value: Any = self.sign * self.step_size_fn(count)
            alone = isinstance(value, Tensor) and value.numel() == 1
            return value.reshape(()) if alone else value

        pairs = zip(grads, for_each_distinct(factor, state.count))
        updates = [g * (x.to(g) if isinstance(x, Tensor) else x) for g, x in pairs]
        return updates, ScaleByScheduleState(count=increment(state.count))


@transformation
def scale_by_schedule(step_size_fn: Schedule) -> LeafRule:
    """Return the transformation u = step_size_fn(count) * g.

    Args:
        step_size_fn: Maps the number of previous updates of a leaf, a 0-dim int64 tensor, to a
            number or a 0-dim tensor, which is differentiated. An integer tensor is divided in
            torch's default dtype: `1 / (1 + count.double())` has the digits of float64.

    Example:
        >>> import torch
        >>> halving = scale_by_schedule(lambda count: 0.5**count)
        >>> g = torch.tensor([1.0])
        >>> u, state = halving.update(g, halving.init(g))
        >>> u, halving.update(g, state)[0]
        (tensor([1.]), tensor([0.5000]))
    """
    return ScaleBySchedule(step_size_fn)
