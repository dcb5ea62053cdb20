# SPDX-License-Identifier: Apache-2.0
"""A traced run that carries tangents."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.diff.explicit.dual import tangent_of
from torchopt.diff.explicit.forms import described, distinct_tensors, with_counts, with_ints
from torchopt.diff.explicit.forward import ForwardRun, dual_step
from torchopt.diff.explicit.step import Carry, start
from torchopt.diff.explicit.taken import holes_at, tensors_at, with_given
from torchopt.diff.explicit.trace import Program, traced
from torchopt.diff.explicit.traced import TracedRun
from torchopt.diff.explicit.unrolled import Outputs
from torchopt.diff.surroundings import Surroundings
from torchopt.torch_internals import forward_mode
from torchopt.tree import is_smooth

__all__ = ["TracedForwardRun"]

Tangents = list[Tensor]


class TracedForwardRun(ForwardRun, TracedRun):
    """A run of two programs: a step, and its tangents for one scalar."""

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the result and keep their tangents."""
        call = self.call
        tensors = [x.detach() for x in inputs]
        at_start = self._surroundings()
        first = start(call, call.optimizer, tensors).detached()
        carry = with_counts(first, call.params.spec)
        program, losses, aux = self._first(carry, tensors), [], []
        seen = self._seen
        of_inputs, tangents = self._starts(tensors, at_start)
        rows: list[list[Any]] = [[] for _ in tangents]
        for t in range(call.steps):
            if self._seeing and t > 0:
                seen = seen.retaken()
            before = carry
            carry, value, extra, *_ = self._stepped(program, before, tensors, range(t, t + 1))
            losses += value
            aux += extra
            if t == call.first > 0:
                tangents = [[torch.zeros_like(x) for x in row] for row in tangents]
            if t >= call.first:
                push = self._push(before, tensors, t)
                for i, row in enumerate(tangents):
                    with seen.replayed() if self._seeing else contextlib.nullcontext():
                        given = self._arguments(before, tensors, t, row, of_inputs[i])
                        tangents[i], found = _read(push, push(given, self._held()), before)
                    rows[i].append(found)
            if t + 1 < call.steps:
                steps = range(t + 1, t + 2)
                program = self._next(program, carry, tensors, steps, range(t, t + 1))
        carry = with_ints(carry, first)
        found = Outputs.of(call, carry, losses, aux)
        self.outputs = self._with(found, [x.new_empty(0) for x in self._flat(found)])
        self.tangents = [
            [*_at_tensors(carry, smooth), *self._columns(found, row)]
            for smooth, row in zip(tangents, rows)
        ]
        return self._flat(found)

    def _starts(
        self, tensors: Sequence[Tensor], seen: Surroundings
    ) -> tuple[list[dict[int, Tensor]], list[Tangents]]:
        """Return the tangents of the inputs and of the start of the run, for each scalar."""
        of_inputs, of_carry = [], []
        with forward_mode():
            for scalar in self._scalars():
                direction = self._direction(tensors, *scalar)
                smooth = self._start(direction, seen).smooth
                of_carry.append([_dense(x) for x in smooth])
                of_inputs.append({j: _dense(direction.tensors[j]) for j in self.call.wanted})
        return of_inputs, of_carry

    def _arguments(
        self,
        carry: Carry,
        tensors: Sequence[Tensor],
        step: int,
        tangents: Tangents,
        of_inputs: dict[int, Tensor],
    ) -> list[Tensor]:
        used = [h for h in holes_at(self.call, step) if h.index in of_inputs]
        more = [of_inputs[h.index][step] if h.by_step else of_inputs[h.index] for h in used]
        once = distinct_tensors(carry.tensors())[0]
        given = tensors_at(self.call, tensors, range(step, step + 1))
        return [*once, *given, *tangents, *more]

    def _push(self, carry: Carry, tensors: Sequence[Tensor], step: int) -> Program:
        once, where = distinct_tensors(carry.tensors())
        holes = holes_at(self.call, step)
        wanted = [k for k, h in enumerate(holes) if h.index in self.call.wanted]
        smooth = [torch.zeros_like(x) for x in carry.smooth]

        def pushed(*flat: Tensor) -> tuple[list[Tensor], Any]:
            remaining = list(flat)
            before, inputs, tangents = (_taken(remaining, n) for n in sizes)
            with forward_mode():
                whole = carry.with_tensors([before[i] for i in where])
                duals = [forward_ad.make_dual(x, d) for x, d in zip(whole.smooth, tangents)]
                for k, d in zip(wanted, remaining):
                    inputs[k] = forward_ad.make_dual(inputs[k], d)
                full = with_given(self.call, inputs, range(step, step + 1))
                optimizer = self.call.optimizer_with(full)
                after, value, aux = dual_step(
                    self.call, full, optimizer, whole.with_smooth(duals), step
                )
                out = [_dense(x) for x in after.smooth]
                others = [tangent_of(x) for x in (value, *aux.leaves)]
            return [*out, *(x for x in others if x is not None)], [x is not None for x in others]

        def make() -> Program:
            zeros = {i: torch.zeros_like(x) for i, x in enumerate(tensors) if i in wanted_inputs}
            return self._make(pushed, self._arguments(carry, tensors, step, smooth, zeros))

        wanted_inputs = set(self.call.wanted)
        sizes = (len(once), len(holes), len(smooth))
        key = ("push", self._key(carry, range(step, step + 1)))
        return traced(
            key, lambda: f"the tangents of a step of {described(self.call, self._compiled)}", make
        )


def _read(push: Program, found: Sequence[Tensor], carry: Carry) -> tuple[Tangents, Any]:
    """Return the tangents of the carry, and those of the loss with its aux."""
    count = len(carry.smooth)
    rest = iter(found[count:])
    value, *aux = [next(rest) if has else None for has in push.form]
    return list(found[:count]), (value, aux)


def _taken(values: list[Tensor], count: int) -> list[Tensor]:
    """Remove the first `count` values from a list and return them."""
    out, values[:count] = values[:count], []
    return out


def _dense(x: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(x)
    return torch.zeros_like(primal.detach()) if tangent is None else tangent.detach()


def _at_tensors(carry: Carry, smooth: Sequence[Tensor]) -> list[Tensor | None]:
    remaining = iter(smooth)
    return [next(remaining) if is_smooth(x) else None for x in carry.tensors()]
