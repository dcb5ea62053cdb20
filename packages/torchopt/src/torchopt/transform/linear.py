# SPDX-License-Identifier: Apache-2.0
"""The rules that all optimizers share: sign, weight decay and step size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from torchopt.torch_internals import foreach_mul
from torchopt.transform.leaf_rule import LeafRule
from torchopt.tree_function import are_unfollowed

if TYPE_CHECKING:
    from torchopt.transform.plan import Plan

__all__ = ["AddDecayedWeights", "FlipSignAndAddWeightDecay", "Scale", "plus"]


def plus(x: Tensor, y: Tensor, factor: float | Tensor) -> Tensor:
    """Return x + factor y, in one operation if the factor is a number."""
    if isinstance(factor, Tensor):
        return x + y * factor.to(x)
    return x.add(y, alpha=factor)


@dataclass(frozen=True)
class _WeightDecay(LeafRule):
    weight_decay: float | Tensor
    reads_params: ClassVar[bool] = True
    needs_params: ClassVar[str] = "weight decay"


@dataclass(frozen=True)
class FlipSignAndAddWeightDecay(_WeightDecay):
    """u = -g or g, plus weight_decay * p."""

    maximize: bool

    def join(self, plan: Plan) -> Plan | None:
        return plan.penalized(self.weight_decay, self.maximize)

    def moved(self, g: Tensor, p: Any) -> Tensor:
        return plus(g.neg() if self.maximize else g, p, self.weight_decay)


@dataclass(frozen=True)
class AddDecayedWeights(_WeightDecay):
    """u = g + factor * weight_decay * p; a factor of None is one."""

    factor: float | Tensor | None = None

    def join(self, plan: Plan) -> Plan | None:
        return plan.decayed(self.weight_decay) if self.factor is None else None

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        decay = self.weight_decay if self.factor is None else self.factor * self.weight_decay
        return [plus(g, p, decay) for g, p in zip(grads, params)], state


@dataclass(frozen=True)
class Scale(LeafRule):
    """u = sign * step_size * g, with `sign` 1 or -1."""

    step_size: float | Tensor
    sign: int = 1
    keeps_sparse: ClassVar[bool] = True

    def hyper_parameters(self) -> dict[str, Any]:
        """Return the step size, or `maximize` for a sign change."""
        return {"lr": self.step_size} if self.sign == -1 else {"maximize": True}

    def join(self, plan: Plan) -> Plan | None:
        return plan.scaled(self.sign, self.step_size)

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        step_size = self.sign * self.step_size
        if isinstance(step_size, torch.Tensor):
            return [g * step_size.to(g) for g in grads], state
        if grads and are_unfollowed(grads):
            return list(foreach_mul(grads, step_size)), state
        return [g * step_size for g in grads], state
