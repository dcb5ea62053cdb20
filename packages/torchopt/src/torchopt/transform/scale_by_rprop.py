# SPDX-License-Identifier: Apache-2.0
"""Rprop's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.starts import filled_like, zeros_like
from torchopt.transform.validate import are_numbers, check_at_least_zero

__all__ = ["ScaleByRpropState", "scale_by_rprop"]


class ScaleByRpropState(NamedTuple):
    """`previous`: the last gradient, zero where it changed its sign; `step_size`."""

    previous: Any
    step_size: Any


@dataclass(frozen=True)
class ScaleByRprop(LeafRule):
    """The sign of the gradient times a step size of its own."""

    initial_size: float | Tensor
    eta_minus: float | Tensor
    eta_plus: float | Tensor
    min_step: float | Tensor
    max_step: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = (
        "previous",
        "step_size",
    )
    overwritten_fields: ClassVar[tuple[str, ...]] = (
        "previous",
        "step_size",
    )

    def init_leaves(self, params: list[Tensor]) -> ScaleByRpropState:
        """Return gradients of zero and step sizes of `lr`."""
        return ScaleByRpropState(
            previous=zeros_like(params, False),
            step_size=filled_like(params, self.initial_size),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        updates, previous, sizes = [], [], []
        for g, old, size in zip(grads, state.previous, state.step_size):
            agreement = g * old
            turned = agreement < 0
            grown = torch.where(agreement > 0, size * self.eta_plus, size)
            size = torch.where(turned, size * self.eta_minus, grown)
            size = torch.where(size < self.min_step, self.min_step, size)
            size = torch.where(size > self.max_step, self.max_step, size)
            g = torch.where(turned, 0.0, g)
            updates.append(torch.sign(g) * size)
            previous.append(g)
            sizes.append(size)
        return updates, ScaleByRpropState(previous=previous, step_size=sizes)


@transformation
def scale_by_rprop(
    lr: float | Tensor = 1e-2,
    eta_minus: float | Tensor = 0.5,
    eta_plus: float | Tensor = 1.2,
    min_step: float | Tensor = 1e-6,
    max_step: float | Tensor = 50.0,
) -> LeafRule:
    r"""Return the transformation to Rprop's step: the sign of g times a step size for each number.

    A step size grows by `eta_plus` while its gradient keeps its sign and shrinks by `eta_minus`
    when it changes, in which case there is no step. Nor is there where g is NaN, as in
    torch.optim.Rprop.

    Args:
        lr: The first step size; steps are differentiable with respect to it.
        eta_minus: In (0, 1).
        eta_plus: > 1.
        min_step: The smallest step size.
        max_step: The largest step size.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        M. Riedmiller, H. Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The
        RPROP Algorithm, 1993. The variant without a step back is that of torch.optim.Rprop.
    """
    check_at_least_zero(lr, "learning rate")
    if are_numbers(eta_minus, eta_plus) and not 0.0 < eta_minus < 1.0 < eta_plus:
        raise ValueError(f"Invalid eta values: {eta_minus}, {eta_plus}")
    if are_numbers(min_step, max_step) and not 0.0 <= min_step <= max_step:
        raise ValueError(f"Invalid step sizes: {min_step}, {max_step}")
    return ScaleByRprop(lr, eta_minus, eta_plus, min_step, max_step)
