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
from torchopt.diff.explicit.forms import WHERE, Form, distinct_tensors
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.packing import Packing
from torchopt.diff.explicit.step import Aux, Carry
from torchopt.diff.explicit.taken import inputs_of
from torchopt.diff.explicit.trace import Program, versions
from torchopt.diff.explicit.variables import Input
from torchopt.torch_internals import foreach_add, foreach_add_

__all__ = ["Caller", "LaterMoment", "Straight", "chained", "pulled_through", "require_unchanged"]


class LaterMoment:
    """A moment of a run that is assembled on demand."""

    def __init__(
        self,
        carry: Carry,
        where: Sequence[int],
        packing: Packing,
        tensors: Sequence[Tensor],
        seen: object,
    ) -> None:
        self._carry, self._where, self._packing = carry, where, packing
        self._tensors, self._seen = tensors, seen

    def fetched(self) -> Moment:
        """Return the moment."""
        once = self._packing.unpacked(self._tensors)
        carry = self._carry.with_tensors([once[i] for i in self._where])
        return Moment(carry, self._seen)  # type: ignore[arg-type]


class Caller:
    """Calls a program repeatedly, with results of the last call among its arguments.

    A program returns tensors with the same strides each time, so if the arguments of the second
    call have the expected strides, those of all later calls do too.
    """

    def __init__(self, program: Program) -> None:
        self._program, self._calls, self._fits = program, 0, False
        self.copies = False  # whether an argument had to be copied

    def __call__(self, arguments: list[Tensor]) -> Sequence[Tensor]:
        """Return the results for these arguments."""
        if not self._fits:
            fitted = self._program.fitted(arguments)
            self._fits = fitted is arguments and self._calls > 0
            self.copies |= fitted is not arguments
            self._calls, arguments = self._calls + 1, fitted
        return self._program.function(arguments)


def chained(
    call: Callable[[list[Tensor]], Sequence[Tensor]],
    before: Sequence[Tensor],
    others: Sequence[Tensor],
    count: int,
    states: list[Sequence[Tensor]] | None = None,
) -> tuple[Sequence[Tensor], list[Sequence[Tensor]]]:
    """Call a program repeatedly, with its first results in place of its first arguments.

    Args:
        call: The program.
        before: Its first arguments in the first call.
        others: Its other arguments.
        count: The number of calls.
        states: A list that gets the first arguments of each call.

    Returns:
        (the first results of the last call, the other results of each call).
    """
    size, rests = len(before), list[Sequence[Tensor]]()
    for _ in range(count):
        if states is not None:
            states.append(before)
        found = call([*before, *others])
        before = found[:size]
        rests.append(found[size:])
    return before, rests


def pulled_through(
    call: Callable[[list[Tensor]], Sequence[Tensor]],
    kept: list[Sequence[Tensor]],
    smooth: Sequence[Tensor],
    filled: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
    size: int | None = None,
) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Return the cotangents of the carry at the start, and the sums of those of the inputs.

    Args:
        call: The adjoint of a program.
        kept: What the calls of the program kept for it; the list is emptied.
        smooth: The cotangents of the carry at the end.
        filled: Inserts zeros for cotangents that the adjoint leaves out.
        size: How many cotangents of the carry it returns; None: all.
    """
    size, total = len(smooth) if size is None else size, list[Tensor]()
    own = False  # whether the sums are tensors that nothing else refers to
    while kept:
        saved = kept.pop()
        found = call([*saved, *smooth])
        del saved  # so that its memory can be reused for the next
        smooth, others = found[:size], found[size:]
        if filled is not None:
            smooth = filled(smooth)
        if not total:
            total = list(others)
        elif own:
            foreach_add_(total, list(others))
        else:
            total, own = foreach_add(total, list(others)), True
    return smooth, list(total) if own else [x.clone() for x in total]


def require_unchanged(
    held: Sequence[int],
    names: Sequence[str],
    before: Sequence[int],
    now: Sequence[int],
    otherwise: str = "",
) -> None:
    """Raise if the version of a tensor that the loss reaches differs from that in the run.

    Args:
        held: The positions of the tensors that count.
        names: The names of all tensors.
        before: Their versions in the run.
        now: Their versions now.
        otherwise: What was changed if none of them was; "": nothing was.
    """
    changed = (names[i] for i in held if before[i] != now[i])
    if name := next(changed, otherwise):
        raise RuntimeError(
            f"{WHERE}: expected tensors that are not changed between the run and its backward "
            f"pass, got {name}, which was changed in place; change a clone of it."
        )


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
        self.copies = False  # whether the arguments of the program had to be copied

    def run(self, count: int, seen: object) -> tuple[Carry, list[Tensor], list[Aux], list[object]]:
        """Return the carry after `count` calls, the losses, their aux, and the moments before."""
        form, packing, losses, aux = self._form, self._packing, list[Tensor](), list[Aux]()
        states = None if form.pull is None else list[Sequence[Tensor]]()
        caller = Caller(self._program)
        last, rests = chained(caller, self._tensors, self._others, count, states)
        once, self.copies = packing.unpacked(last), caller.copies
        moments: list[object] = [
            LaterMoment(form.carry, form.where, packing, x, seen) for x in (states or ())
        ]
        if moments:
            moments[0] = LaterMoment(self._start, self._where, packing, self._tensors, seen)
        for found in rests:
            values, more, _, rest = form.beside(found, 0)
            if form.pull is not None:
                self._kept.append(rest)
            losses += values
            aux += more
        carry = form.carry_of(once)
        self.ends = carry.smooth
        # Copies, because the graph of the outputs refers to the run. Parts of a packed buffer also
        # share its memory and its version.
        if packing.places:
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
        dense = [
            torch.zeros_like(x) if c is None else c for c, x in zip(cotangents.carry, self.ends)
        ]
        if versions(self._watched) != self._versions:
            self._require_same()

        def filled(found: Sequence[Tensor]) -> list[Tensor]:
            remaining = iter(found)
            pairs = zip(pull.present, self.ends)
            return [next(remaining) if p else torch.zeros_like(x) for p, x in pairs]

        missing = pull.present.count(False)  # none if anything is packed
        caller, size = Caller(pull.program), packing.count - missing
        smooth, total = pulled_through(
            caller, self._kept, packing.packed(dense), filled if missing else None, size
        )
        taken = inputs_of(self._call, range(self._call.steps))
        out = [x if p else None for p, x in zip(pull.present, packing.unpacked(smooth))]
        return out, dict(zip((taken[k] for k in pull.places), total))
