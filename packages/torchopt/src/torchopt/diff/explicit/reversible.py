# SPDX-License-Identifier: Apache-2.0
"""A run of momentum steps that keeps only its last state and reverses the steps exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.diff.explicit.adjoint import gradient
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.fixed_point import FixedPoint, from_units
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.run import Run
from torchopt.diff.explicit.step import Carry, start
from torchopt.diff.explicit.unrolled import Outputs
from torchopt.diff.explicit.variables import Leaves
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotDifferentiableError
from torchopt.tree import is_smooth

__all__ = ["ReversibleRun"]

WHERE = 'inner_loop: keep="reversible"'


class ReversibleRun(Run):
    """A run in integers; the backward pass computes one more gradient for each step."""

    def __init__(self, call: Call) -> None:
        super().__init__(call, 1)
        self._lr, self._mu = _hyper_parameters(call.optimizer)
        self._last: FixedPoint
        self._first: FixedPoint
        self._form: Carry
        self._stepped: list[bool]  # which parameters have a gradient

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the result."""
        call = self.call
        tensors = [x.detach() for x in inputs]
        self._seen = Surroundings(call.loss, tensors, beside=call.optimizer).retaken()
        self._form = start(call, call.optimizer_with(tensors), tensors).detached()
        losses, aux = [], []
        state = self._first = FixedPoint.of(*self._halves(self._form), self._mu)
        for t in range(call.steps):
            if t == call.first:
                self._first = state
            grads, value, extra = gradient(call, self._carry(state.position, state), tensors, t)
            found = self._smooth(grads)
            if t == 0:
                self._stepped = [g is not None for g in found]
            elif self._stepped != [g is not None for g in found]:
                raise _unfit("a loss that depends on the same parameters in each step")
            state = state.stepped(found, self._lr)
            losses.append(value)
            aux.append(extra)
        if state.fits is not None and not bool(state.fits):
            raise OverflowError(
                f"{WHERE}: expected parameters, gradients and velocities below 2^16, which is the "
                'range of the integers of a reversible run, got more or NaN; use keep="steps".'
            )
        self._last = state
        outputs = Outputs.of(call, self._carry(state.position, state), losses, aux)
        self.outputs = self._with(outputs, [x.new_empty(0) for x in self._flat(outputs)])
        return self._flat(outputs)

    def _halves(self, carry: Carry) -> tuple[list[Tensor], list[Tensor]]:
        count = sum(map(is_smooth, carry.params))
        if len(carry.smooth) != 2 * count:
            raise _unfit("a state of one velocity for each parameter")
        return carry.smooth[:count], carry.smooth[count:]

    def _carry(self, position: Sequence[Tensor], state: FixedPoint) -> Carry:
        every = (*position, *state.velocity)
        return self._form.with_smooth([from_units(x, y) for x, y in zip(every, self._form.smooth)])

    def _smooth(self, grads: Sequence[Any]) -> list[Tensor | None]:
        return [g for g, x in zip(grads, self._form.params) if is_smooth(x)]

    def _reversed(self, inputs: Leaves, end: int) -> Iterator[tuple[range, Moment]]:
        """Yield the differentiated steps with the state before each, in reverse order."""
        call, state = self.call, self._last
        for t in range(end - 1, call.first - 1, -1):
            with self._seen.replayed():
                before = state.positions_before(self._stepped, self._lr)
                grads, _, _ = gradient(call, self._carry(before, state), inputs.constants, t)
            state = state.undone(self._smooth(grads), self._lr)
            yield range(t, t + 1), Moment(self._carry(state.position, state), self._seen, grads)
        pairs = zip(
            (*state.position, *state.velocity), (*self._first.position, *self._first.velocity)
        )
        if not all(torch.equal(x, y) for x, y in pairs):
            raise NotDifferentiableError(
                f"{WHERE}: expected a loss with the same gradient at the same point, got one with "
                "another gradient in the backward pass: it draws random numbers, as dropout does, "
                "changes what it reads, or runs kernels whose sums have no fixed order. Use "
                'keep="steps".'
            )


def _hyper_parameters(optimizer: GradientTransformation) -> tuple[float, Fraction]:
    """Return the learning rate and the momentum of SGD with momentum."""
    stages = getattr(getattr(optimizer.init, "__self__", None), "transformations", ())
    rules: list[Any] = [getattr(getattr(x.update, "__self__", None), "rule", None) for x in stages]
    if [type(rule).__name__ for rule in rules] != ["Trace", "Scale"]:
        raise _unfit("torchopt.sgd(lr, momentum) without weight decay, dampening or a schedule")
    trace, scale = rules
    if trace.nesterov:
        raise _unfit("no Nesterov correction")
    lr, mu = map(_number, (scale.step_size, trace.momentum))
    ratio = Fraction(mu).limit_denominator(4096)
    eps = 1e-6 if isinstance(trace.momentum, Tensor) else 1e-15
    if not 0 < ratio < 1 or abs(float(ratio) - mu) > eps:
        raise _unfit(
            "a momentum between 0 and 1 that is a fraction with a denominator of at most 4096, "
            f"such as 0.9, not {mu}"
        )
    return -scale.sign * lr, ratio


def _number(x: float | Tensor) -> float:
    return float(x.detach() if isinstance(x, Tensor) else x)


def _unfit(expected: str) -> ValueError:
    return ValueError(
        f"{WHERE}: expected {expected}: only such steps can be undone. "
        'Use keep="steps" or a number of snapshots.'
    )
