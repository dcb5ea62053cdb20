# SPDX-License-Identifier: Apache-2.0
"""Momentum: a decaying sum of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero

__all__ = ["DampenedTraceState", "TraceState", "trace"]


class TraceState(NamedTuple):
    """`trace`: the decaying sum, like the parameters."""

    trace: Any


class DampenedTraceState(NamedTuple):
    """`trace`: the decaying sum; `count`: how many gradients each leaf has had.

    With dampening the first gradient counts in full, so the state has to know which one is the
    first.
    """

    trace: Any
    count: Any


@dataclass(frozen=True)
class Trace(LeafRule):
    """Momentum without dampening."""

    momentum: float | Tensor
    nesterov: bool
    moment_requires_grad: bool
    leaf_fields: ClassVar[tuple[str, ...]] = ("trace",)
    overwritten_fields: ClassVar[tuple[str, ...]] = ("trace",)

    def init_leaves(self, params: list[Tensor]) -> Any:
        """Return traces of zero."""
        return TraceState(trace=zeros_like(params, self.moment_requires_grad))

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return t' = momentum t + g, or g + momentum t' with Nesterov's correction."""
        traces = [t * self.momentum + g for g, t in zip(grads, state.trace)]
        return self._direction(grads, traces, inplace=inplace), TraceState(trace=traces)

    def _direction(
        self, grads: list[Tensor], traces: list[Tensor], *, inplace: bool
    ) -> list[Tensor]:
        if self.nesterov:
            return [g + t * self.momentum for g, t in zip(grads, traces)]
        # The state must not alias the updates, which the caller may write to.
        return traces if inplace else [t.clone() for t in traces]


@dataclass(frozen=True)
class DampenedTrace(Trace):
    """Momentum with dampening."""

    dampening: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = ("trace", "count")

    def init_leaves(self, params: list[Tensor]) -> Any:
        """Return traces and counts of zero."""
        return DampenedTraceState(
            trace=zeros_like(params, self.moment_requires_grad), count=zero_counts(params)
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return t' = momentum t + w g, where w is 1 in a leaf's first step and 1 - dampening
        later.
        """
        weights: dict[int, Tensor] = {}
        for count in state.count:
            if id(count) not in weights:
                weights[id(count)] = 1.0 - (count > 0).to(torch.float64) * self.dampening
        traces = [
            t * self.momentum + g * weights[id(count)].to(g.dtype)
            for g, t, count in zip(grads, state.trace, state.count)
        ]
        return self._direction(grads, traces, inplace=inplace), DampenedTraceState(
            trace=traces, count=increment(state.count)
        )


@transformation
def trace(
    momentum: float | Tensor = 0.9,
    dampening: float | Tensor = 0.0,
    nesterov: bool = False,
    moment_requires_grad: bool = False,
) -> LeafRule | None:
    r"""Return the transformation that replaces gradients by their decaying sum.

    .. math::
        t' = \mu t + w g, \qquad u = t' \quad\text{or, with Nesterov's correction,}\quad u = g + \mu
        t'

    where w is 1 in the first step of a leaf and 1 - dampening later, as in torch.optim.SGD.

    Args:
        momentum: The decay mu, >= 0; 0 gives the identity.
        dampening: Part of each gradient but the first that is left out.
        nesterov: Look ahead by one step.
        moment_requires_grad: Make the initial trace a leaf that requires a gradient. Gradients flow
            through the trace either way.

    Raises:
        ValueError: A negative momentum, or `nesterov` without momentum or with dampening.

    References:
        I. Sutskever, J. Martens, G. Dahl, G. Hinton, On the importance of initialization and
        momentum in deep learning, ICML 2013.
    """
    check_at_least_zero(momentum, "momentum value")
    plain = not isinstance(momentum, torch.Tensor) and not isinstance(dampening, torch.Tensor)
    if nesterov and plain and (momentum <= 0.0 or dampening != 0.0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if not isinstance(momentum, torch.Tensor) and momentum == 0.0:
        return None
    if not isinstance(dampening, torch.Tensor) and dampening == 0.0:
        return Trace(momentum, nesterov, moment_requires_grad)
    return DampenedTrace(momentum, nesterov, moment_requires_grad, dampening)
