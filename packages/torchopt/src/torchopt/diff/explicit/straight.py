# SPDX-License-Identifier: Apache-2.0
"""A run of one program that gets its own results as arguments of the next call, as flat lists.

Between two calls no tree is built and nothing is looked up, which on small problems would take
longer than the programs themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchopt.diff.explicit.adjoint import Cotangents
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.forms import Form, distinct_tensors
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.packing import Packing
from torchopt.diff.explicit.step import Aux, Carry
from torchopt.diff.explicit.taken import inputs_of
from torchopt.diff.explicit.trace import Program, versions
from torchopt.diff.explicit.variables import Input

__all__ = ["LaterMoment", "Straight"]


class LaterMoment:
    """A moment of a run that is assembled on demand."""

    def __init__(
        self,
        carry: Carry,
        where: Sequence[int],
        packing: Packing,
        tensors: list[Tensor],
        seen: object,
    ) -> None:
        self._carry, self._where, self._packing = carry, where, packing
        self._tensors, self._seen = tensors, seen

    def fetched(self) -> Moment:
        """Return the moment."""
        once = self._packing.unpacked(self._tensors)
        carry = self._carry.with_tensors([once[i] for i in self._where])
        return Moment(carry, self._seen)  # type: ignore[arg-type]


class _Caller:
    """Calls a program repeatedly, with results of the last call among its arguments.

    A program returns tensors with the same strides each time, so if the arguments of the second
    call have the expected strides, those of all later calls do too.
    """

    def __init__(self, program: Program) -> None:
        self._program, self._calls, self._fits = program, 0, False

    def __call__(self, arguments: list[Tensor]) -> Sequence[Tensor]:
        if not self._fits:
            fitted = self._program.fitted(arguments)
            self._fits = fitted is arguments and self._calls > 0
            self._calls, arguments = self._calls + 1, fitted
        found: Sequence[Tensor] = self._program.function(*arguments)
        return found


class Straight:
    """Steps by one program that keeps the tensors for the adjoint, and their adjoints.

    Args:
        call: The call, whose steps all use the same inputs.
        program: The program of one or several steps.
        carry: Parameters and state at the start.
        given: The inputs that the steps use.
        held: The tensors that the loss and the optimizer reach.
        require_same: Raises the error for a tensor that was changed in place.
    """

    def __init__(
        self,
        call: Call,
        program: Program,
        carry: Carry,
        given: Sequence[Tensor],
        held: Sequence[Tensor],
        require_same: Callable[[], None],
    ) -> None:
        self._call, self._program, self._start = call, program, carry
        self._require_same = require_same
        self._form: Form = program.form
        once, self._where = distinct_tensors(carry.tensors())
        self._packing = program.taken or Packing(len(once))
        self._tensors = self._packing.packed(once)
        self._others = [*given, *(held[i] for i in program.held)]
        self._kept: list[Sequence[Tensor]] = []
        self._watched: list[Tensor] = []
        self._versions: list[int] = []
        self.ends: list[Tensor] = []  # the smooth tensors of the last carry

    def run(self, count: int, seen: object) -> tuple[Carry, list[Tensor], list[Aux], list[object]]:
        """Return the carry after `count` calls, the losses, their aux, and the moments before."""
        form, size, call = self._form, len(self._tensors), _Caller(self._program)
        losses, aux, before = list[Tensor](), list[Aux](), self._tensors
        packing = self._packing
        moments: list[object] = [LaterMoment(self._start, self._where, packing, before, seen)]
        for number in range(count):
            if number and form.pull is not None:
                moments.append(LaterMoment(form.carry, form.where, packing, before, seen))
            found = call([*before, *self._others])
            before = list(found[:size])
            values, more, _, rest = form.beside(found, size)
            if form.pull is not None:
                self._kept.append(rest)
            losses += values
            aux += more
        once = packing.unpacked(before)
        carry = form.carry_of(once)
        self.ends = carry.smooth
        # What the run holds is none of its outputs: they have a graph, which holds the run.
        if packing.places:  # whose parts share its memory and its version
            carry = form.carry_of([x.clone() for x in once])
        else:
            carry = carry.detached()
        # Nothing else refers to the tensors between the first step and the last.
        self._watched = [x for rest in (*self._kept[:1], *self._kept[-1:]) for x in rest]
        self._versions = versions(self._watched)
        return carry, losses, aux, moments

    def pull_back(self, cotangents: Cotangents) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
        """Return the cotangents of the carry at the start and of the inputs.

        Args:
            cotangents: The cotangents of the carry at the end; those of the losses must be None.
        """
        pull = self._form.pull
        assert pull is not None
        packing = pull.program.taken or Packing(len(self.ends))
        call, size = _Caller(pull.program), packing.count - pull.present.count(False)
        dense = [
            torch.zeros_like(x) if c is None else c for c, x in zip(cotangents.carry, self.ends)
        ]
        smooth = packing.packed(dense)
        total: list[Tensor] = []
        if versions(self._watched) != self._versions:
            self._require_same()
        while self._kept:
            saved = self._kept.pop()
            found = list(call([*saved, *smooth]))
            del saved  # so that its memory can be reused for the next
            smooth, others = found[:size], found[size:]
            if size < packing.count:  # and nothing is packed
                remaining = iter(smooth)
                smooth = [
                    next(remaining) if p else torch.zeros_like(x)
                    for p, x in zip(pull.present, self.ends)
                ]
            if not total:
                total = [x.clone() for x in others]
            elif others:
                torch._foreach_add_(total, others)
        taken = inputs_of(self._call, range(self._call.steps))
        out = [x if p else None for p, x in zip(pull.present, packing.unpacked(smooth))]
        return out, dict(zip((taken[k] for k in pull.places), total))
