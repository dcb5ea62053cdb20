# SPDX-License-Identifier: Apache-2.0
"""Stochastic gradient descent, and momentum: a decaying sum of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation
from torchopt.transform.linear import plus
from torchopt.transform.rule import Hyper, Rule, at_least_zero, number
from torchopt.transform.validate import are_numbers, check
from torchopt.typing import ScalarOrSchedule

__all__ = ["DampenedTraceState", "TraceState", "sgd", "trace"]


class TraceState(NamedTuple):
    """`trace`: the decaying sum, like the parameters."""

    trace: Any


class DampenedTraceState(NamedTuple):
    """`trace`: the decaying sum; `count`: the number of gradients that each leaf has received.

    The first gradient is not dampened, so the state has to record whether a leaf has had one.
    """

    trace: Any
    count: Any


@dataclass(frozen=True)
class Trace(Rule):
    """u = t' = momentum t + w g, or g + momentum t' with Nesterov's correction."""

    momentum: Hyper = at_least_zero("momentum value")
    dampening: Hyper = number()
    nesterov: bool = False
    moment_requires_grad: bool = False
    State: ClassVar[Any] = TraceState
    constant_derivative = True

    @property
    def kernel(self) -> str:  # type: ignore[override]
        return "nesterov" if self.nesterov else "momentum"

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        """Return w, None for one: 1 in the first step, 1 - dampening later."""
        if are_numbers(self.dampening) and self.dampening == 0.0:
            return (None,)
        return (1.0 - (k > 1).to(torch.float64) * self.dampening,)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        t = plus(g if c[0] is None else g * c[0], state[0], self.momentum)
        return plus(g, t, self.momentum) if self.nesterov else t, (t,)


@dataclass(frozen=True)
class DampenedTrace(Trace):
    """The trace with dampening, which treats the first step differently."""

    State = DampenedTraceState


@transformation
def trace(
    momentum: float | Tensor = 0.9,
    dampening: float | Tensor = 0.0,
    nesterov: bool = False,
    moment_requires_grad: bool = False,
) -> Rule | None:
    r"""Return the transformation that replaces gradients by their decaying sum.

    .. math::
        t' = \mu t + w g, \qquad u = t' \quad\text{or, with Nesterov's correction,}\quad u = g + \mu
        t'

    where w is 1 in the first step of a leaf and 1 - dampening later, as in torch.optim.SGD.

    Args:
        momentum: The decay mu, >= 0; 0 gives the identity.
        dampening: Fraction of each gradient but the first that is left out.
        nesterov: Look ahead by one step; needs a momentum and no dampening.
        moment_requires_grad: Make the initial trace a leaf that requires a gradient. Gradients flow
            through the trace in any case.

    Raises:
        ValueError: A negative momentum, or `nesterov` without momentum or with dampening.

    References:
        I. Sutskever, J. Martens, G. Dahl, G. Hinton, On the importance of initialization and
        momentum in deep learning, ICML 2013.

    Example:
        >>> import torch
        >>> momentum = trace(0.5)
        >>> g = torch.tensor([1.0])
        >>> u, state = momentum.update(g, momentum.init(g))
        >>> u, momentum.update(g, state)[0]
        (tensor([1.]), tensor([1.5000]))
    """
    check(momentum, "a number >= 0", "momentum value")
    if nesterov and are_numbers(momentum, dampening) and (momentum <= 0.0 or dampening != 0.0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if are_numbers(momentum) and momentum == 0.0:
        return None
    plain = are_numbers(dampening) and dampening == 0.0
    rule = Trace if plain else DampenedTrace
    return rule(momentum, dampening, nesterov, moment_requires_grad)


@documented(trace)
def sgd(
    lr: ScalarOrSchedule,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    moment_requires_grad: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """Return stochastic gradient descent, with momentum as in torch.optim.SGD.

    Example:
        >>> import torch
        >>> optimizer = sgd(0.1)
        >>> params = (torch.tensor([1.0]),)
        >>> optimizer.update((torch.tensor([2.0]),), optimizer.init(params), inplace=False)[0]
        (tensor([-0.2000]),)
    """
    return optimizer(
        trace.rule(momentum, dampening, nesterov, moment_requires_grad),
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        name="sgd",
    )
