# SPDX-License-Identifier: Apache-2.0
"""Rprop: the sign of the gradient times a step size for each element."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero, number
from torchopt.transform.validate import are_numbers, unpacked

__all__ = ["ScaleByRpropState", "rprop", "scale_by_rprop"]


class ScaleByRpropState(NamedTuple):
    """`previous`: the last gradient, or zero where its sign has changed; `step_size`."""

    previous: Any
    step_size: Any


@dataclass(frozen=True)
class Rprop(Rule):
    """u = sign(g) size'; the size grows while the sign of g stays, and shrinks when it changes."""

    lr: Hyper = at_least_zero("learning rate", 1e-2, starts="step_size")
    eta_minus: Hyper = number(0.5)
    eta_plus: Hyper = number(1.2)
    min_step: Hyper = number(1e-6)
    max_step: Hyper = number(50.0)
    State = ScaleByRpropState
    kernel = "rprop"

    def __post_init__(self) -> None:
        super().__post_init__()
        etas, sizes = (self.eta_minus, self.eta_plus), (self.min_step, self.max_step)
        if are_numbers(*etas) and not 0.0 < etas[0] < 1.0 < etas[1]:
            raise ValueError(
                f"Invalid eta values: {etas[0]}, {etas[1]}; expected 0 < eta_minus < 1 < eta_plus"
            )
        if are_numbers(*sizes) and not 0.0 <= sizes[0] <= sizes[1]:
            raise ValueError(
                f"Invalid step sizes: {sizes[0]}, {sizes[1]}; expected 0 <= min_step <= max_step"
            )

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        """Return the step without its minus sign, the gradient for the next step, and the size."""
        previous, size = state
        agreement = g * previous
        turned = agreement < 0
        grown = torch.where(agreement > 0, size * self.eta_plus, size)
        size = torch.where(turned, size * self.eta_minus, grown)
        size = torch.where(size < self.min_step, self.min_step, size)
        size = torch.where(size > self.max_step, self.max_step, size)
        g = torch.where(turned, 0.0, g)
        return torch.sign(g) * size, (g, size)


@transformation_of(Rprop)
def scale_by_rprop() -> None:
    r"""Return the transformation that computes Rprop's step: sign(g) times a size per element.

    A step size is multiplied by `eta_plus` if the gradient has the sign of the previous one, and by
    `eta_minus` if the sign has changed; in that case there is no step. As in torch.optim.Rprop,
    there is no step where g is NaN either. The minus sign is not part of the step.

    Args:
        lr: The first step size; steps are differentiable with respect to it.
        eta_minus: Factor of the step size if the sign changes, in (0, 1).
        eta_plus: Factor of the step size if the sign stays, > 1.
        min_step: The smallest step size.
        max_step: The largest step size.

    References:
        M. Riedmiller, H. Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The
        RPROP Algorithm, 1993. The variant without a step back is that of torch.optim.Rprop.

    Example:
        >>> import torch
        >>> step = scale_by_rprop(lr=0.1)
        >>> g = torch.tensor([3.0, -0.2])
        >>> u, state = step.update(g, step.init(g))
        >>> u, step.update(g, state)[0]
        (tensor([ 0.1000, -0.1000]), tensor([ 0.1200, -0.1200]))
    """


@documented(scale_by_rprop)
def rprop(
    lr: float | Tensor = 1e-2,
    etas: tuple[float, float] = (0.5, 1.2),
    step_sizes: tuple[float, float] = (1e-6, 50.0),
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Rprop.

    The update is minus the step of `torchopt.transform.scale_by_rprop`.

    Args:
        lr: The first step size, >= 0.
        etas: Factors of the step size where the sign changes, in (0, 1), and where it stays, > 1.
        step_sizes: The smallest and the largest step size.
    """
    eta_minus, eta_plus = unpacked(etas, "etas", (0.5, 1.2))
    direction = Rprop(lr, eta_minus, eta_plus, *unpacked(step_sizes, "step_sizes", (1e-06, 50.0)))
    return optimizer(direction, lr=1.0, maximize=maximize, name="rprop")
