# SPDX-License-Identifier: Apache-2.0
"""A run whose step and its adjoint are traced once and then run for any number of steps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.adjoint import Cotangents, pull_back_start
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.fingerprint import Key, Settings
from torchopt.diff.explicit.forms import (
    WAY_OUT,
    WHERE,
    Form,
    Nothing,
    Pull,
    call_key,
    described,
    distinct_tensors,
    empty_of,
    filled,
    form_key,
    present,
    with_counts,
    with_ints,
)
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.plan import Plan, planned
from torchopt.diff.explicit.repeated import Repeated, is_repeatable
from torchopt.diff.explicit.run import Run, Sums
from torchopt.diff.explicit.step import Aux, Carry, start
from torchopt.diff.explicit.straight import Straight, require_unchanged
from torchopt.diff.explicit.taken import (
    add_up,
    inputs_key,
    pulled_flat,
    read_pulled,
    tensors_at,
    with_given,
)
from torchopt.diff.explicit.trace import Program, Words, make_program, traced, versions
from torchopt.diff.explicit.traced_start import Started
from torchopt.diff.explicit.unrolled import Outputs
from torchopt.diff.explicit.variables import Input, Leaves
from torchopt.diff.explicit.whole import results_of, whole_program
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotTraceableError
from torchopt.tree import is_smooth

__all__ = ["TracedRun"]

WORDS = Words(WHERE, WAY_OUT)


class TracedRun(Run):
    """A run of traced programs.

    Args:
        call: The call.
        snapshots: How many states are kept; see `Run`.
        compiled: Whether the programs are compiled.
        keep_gradients: Whether a gradient is kept beside each state.
        keep_all: Whether intermediate results of a step are kept for its adjoint.
        unroll: How many steps a program takes; a remainder is taken one by one.
        differentiated: Whether there may be a backward pass.
    """

    def __init__(
        self,
        call: Call,
        snapshots: int,
        *,
        compiled: bool,
        keep_gradients: bool,
        keep_all: bool = False,
        unroll: int = 1,
        differentiated: bool = True,
    ) -> None:
        super().__init__(call, snapshots)
        self._compiled, self._keep_gradients = compiled, keep_gradients
        self._keep_all, self._unroll, self._differentiated = keep_all, unroll, differentiated
        self._saved: dict[int, tuple[Pull, list[Tensor], list[int]]] = {}
        self._reach = call.reach()
        self._versions = versions(self._reach.tensors)
        self._common = Key((self._reach.key, compiled, call_key(call)))
        self._adjoints: dict[Hashable, Program] = {}
        self._seeing = self._writes = self._uniform = False
        self._seen = Nothing()  # replaced if its programs draw random numbers or write to buffers
        self._settings = Settings()
        self._last, self._ends = list[Tensor](), list[Tensor]()
        self._straight: Straight | None = None
        self._started: Started | None = None
        self._plan = Plan(None)
        self._at_start: Any = Nothing()  # the surroundings of a start that is not traced

    def _parts(self) -> list[range]:
        """Return the steps, split by the programs that take them."""
        count, size = self.call.steps, self._unroll
        parts = [range(t, t + size) for t in range(0, count - size + 1, size)]
        return [*parts, *(range(t, t + 1) for t in range(count - count % size, count))]

    def _key(self, carry: Carry, steps: range) -> Key:
        started, plan = self._started, self._plan
        first = started is not None and carry is started.carry
        whole = first and len(steps) == self._unroll
        if whole and plan.key is not None:
            return plan.key
        alike = steps[:1] if len(self.call.batches) == 1 else steps
        inputs = tuple(inputs_key(self.call, t) for t in alike)
        form = started.form.key if started and first else form_key(carry)
        key = Key((form, len(steps), inputs, self._common))
        if whole:
            plan.key = key
        return key

    def _surroundings(self) -> Surroundings:
        """Return the surroundings of the loss; if they change, those at the start."""
        if isinstance(self._seen, Surroundings):
            return self._seen
        call = self.call
        with self._settings.restored(WHERE, WAY_OUT):
            return Surroundings(call.loss, call.inputs, beside=call.optimizer).retaken()

    def _make(self, function: Any, examples: Sequence[Tensor]) -> Program:
        call = self.call
        self._reach.require_same(call.reach(), WHERE, WORDS.way_out)
        surroundings, reach = self._surroundings(), (call.loss, call.optimizer)
        program = make_program(
            function, examples, surroundings, reach, WORDS, compiled=self._compiled
        )
        if (program.draws or program.writes) and call.derivative == "first_order":
            raise NotTraceableError(
                f'{WHERE}: expected derivative "reverse" or "mixed" for a loss that draws random '
                'numbers or writes buffers, got "first_order"; use execute="eager".'
            )
        return program

    def _program(
        self, carry: Carry, tensors: Sequence[Tensor], steps: range, *, keep_all: bool | None = None
    ) -> Program:
        once, where = distinct_tensors(carry.tensors())
        inputs = tensors_at(self.call, tensors, steps)
        keep_all = self._keep_all if keep_all is None else keep_all

        def stepped(*flat: Tensor) -> tuple[list[Tensor], Form]:
            before = carry.with_tensors([flat[i] for i in where])
            full = with_given(self.call, flat[len(once) :], steps)
            return results_of(self.call, before, full, steps, with_gradient=len(steps) == 1)[:2]

        def make() -> Program:
            whole = self._whole(carry, [*once, *inputs], steps) if keep_all else None
            if whole is None and keep_all and len(steps) > 1:
                raise NotTraceableError(
                    f"{WHERE}: expected unroll=1 for a loss that draws random numbers or writes in "
                    f"place, got {len(steps)}."
                )
            return whole or self._make(stepped, [*once, *inputs])

        count = "a step" if len(steps) == 1 else f"{len(steps)} steps"
        key = ("step", keep_all, self._key(carry, steps))
        return traced(key, lambda: f"{count} of {described(self.call, self._compiled)}", make)

    def _whole(self, carry: Carry, given: list[Tensor], steps: range) -> Program | None:
        surroundings = self._surroundings()
        return whole_program(
            self.call, carry, given, steps, surroundings, WORDS, compiled=self._compiled
        )

    def _first(self, carry: Carry, tensors: Sequence[Tensor]) -> Program:
        """Return the program of the first step, which decides how the others are run."""
        program = self._program(carry, tensors, self._parts()[0])
        self._seeing, self._writes = program.draws or program.writes, program.writes
        self._seen = self._surroundings() if self._seeing else self._seen
        self._uniform = program.form.stable and len(self.call.batches) == 1
        return program

    def _adjoint(
        self, moment: Moment, tensors: Sequence[Tensor], step: int, here: Cotangents
    ) -> tuple[Program, list[Tensor]]:
        """Return the program of the adjoint of a step, and its arguments."""
        carry, steps = with_counts(moment.carry, self.call.params.spec), range(step, step + 1)
        once, where = distinct_tensors(carry.tensors())
        call, mixed = self.call, self.call.derivative == "mixed" and not self._seeing
        # A loss that draws random numbers or writes to buffers does so once, in the step's order.
        if self._seeing and call.derivative == "mixed":
            call = replace(call, derivative="reverse", blocks=())
        forms = [
            None if values is None else [x is not None for x in values]
            for values in (moment.grads, here.losses[0])
        ]
        parts = [
            once,
            tensors_at(self.call, tensors, steps),
            present(moment.grads or ()),
            present(here.carry),
            present(here.losses[0]),
        ]

        def pulled(*flat: Tensor) -> tuple[list[Tensor], Any]:
            remaining = iter(flat)
            before, inputs, grads, smooth, losses = (
                [next(remaining) for _ in part] for part in parts
            )
            at = carry.with_tensors([before[i] for i in where])
            kept = None if moment.grads is None else filled(moment.grads, grads)
            given = Cotangents([*smooth], [filled(here.losses[0], losses)])
            full = with_given(self.call, inputs, steps)
            return pulled_flat(call, [(at, kept)], full, steps, given)

        arguments = [x for part in parts for x in part]
        short = (*(None if x is None else tuple(x) for x in forms), mixed)
        program = self._adjoints.get(short) if self._uniform else None
        if program is None:
            program = traced(
                ("adjoint", short, self._key(carry, steps)),
                lambda: f"the adjoint of a step of {described(self.call, self._compiled)}",
                lambda: self._make(pulled, arguments),
            )
            self._adjoints[short] = program
        return program, arguments

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the result and keep some of the states."""
        call = self.call
        tensors = [x.detach() for x in inputs]
        first, carry = self._begin(tensors)
        program, losses, aux = self._first(carry, tensors), list[Tensor](), list[Aux]()
        seen: Any = self._seen
        parts, copies, repeats = self._parts(), None, call.repeats
        if self._goes_straight(program):
            given = tensors_at(call, tensors, parts[0])
            straight = Straight(call, program, carry, given, self._held(), self._changed)
            carry, losses, aux, moments = straight.run(len(parts), seen)
            self._last = straight.ends
            if self._differentiated:
                self._straight = straight
                self._moments.update(zip((part.start for part in parts), moments))
            copies, parts = straight.copies, []
        places = {call.first, *self._places(), call.steps - 1} if parts else ()
        for part, following in itertools.zip_longest(parts, parts[1:]):
            t, before = part.start, carry
            seen = seen.retaken() if self._seeing and t in places and t > 0 else seen
            carry, values, extra, grads, rest = self._stepped(program, before, tensors, part)
            pull = program.form.pull
            if pull is not None:
                self._saved[t] = pull, rest, versions(rest)
            if t in places or len(part) > 1:
                kept = grads if self._keep_gradients and pull is None else None
                self._moments.keep(t, Moment(before, seen, kept))
            losses += values
            aux += extra
            if following is not None:
                program = self._next(program, carry, tensors, following, part)
        if not self._last:  # detached, because the graph of the outputs refers to the run
            self._last, carry = carry.smooth, carry.detached()
        found = Outputs.of(call, with_ints(carry, first), losses, aux)
        self.outputs = self._with(found, [empty_of(x.dtype) for x in self._flat(found)])
        if repeats is not None and copies is not None and self._started and is_repeatable(program):
            again = functools.partial(type(self), compiled=self._compiled)
            more = carry, self.outputs, self._unroll, again, copies
            repeats.append(Repeated(call, self._reach, self._started, program, *more))
        return self._flat(found)

    def _begin(self, tensors: list[Tensor]) -> tuple[Carry, Carry]:
        """Return the form of the start of the run, and the start with tensors for integers."""
        call = self.call
        self._plan = planned(call, self._common, self._unroll, self._surroundings, WORDS)
        form = self._plan.start
        if form is None:
            if call.state is None:
                self._at_start = self._surroundings()
            # Outside any graph, the optimizer's own tensors can be used.
            first = start(call, call.optimizer, tensors).detached()
            return first, with_counts(first, call.params.spec)
        self._started = form(tensors, self._reach.tensors)
        return form.first, self._started.carry

    def _goes_straight(self, program: Program) -> bool:
        """Return whether all steps are taken by one program, whose results are all that is kept."""
        kept = program.form.pull is not None or not self._differentiated
        alike = self._uniform and not self._seeing and self.call.alike
        return kept and alike and self.call.steps % self._unroll == 0

    def _next(
        self, program: Program, carry: Carry, tensors: list[Tensor], steps: range, last: range
    ) -> Program:
        """Return the program of the steps after those of `program`."""
        alike = len(steps) == len(last) and len(self.call.batches) == 1
        return program if program.form.stable and alike else self._program(carry, tensors, steps)

    def _stepped(
        self, program: Program, carry: Carry, tensors: list[Tensor], steps: range
    ) -> tuple[Carry, list[Tensor], list[Aux], list[Any], list[Tensor]]:
        arguments = [*distinct_tensors(carry.tensors())[0], *tensors_at(self.call, tensors, steps)]
        return program.form.read(program(arguments, self._held()))  # type: ignore[no-any-return]

    def _held(self) -> tuple[Tensor, ...]:
        """Return the tensors that the loss and the optimizer reach."""
        # When buffers are replayed, they are other tensors.
        return self.call.reach().tensors if self._writes else self._reach.tensors

    def _advanced(self, moment: Moment, step: int, target: int, tensors: list[Tensor]) -> Moment:
        carry, seen = with_counts(moment.carry, self.call.params.spec), moment.seen
        with seen.replayed():
            program: Program | None = None
            for t in range(step, target):
                if program is None or not (program.form.stable and len(self.call.batches) == 1):
                    program = self._program(carry, tensors, range(t, t + 1), keep_all=False)
                carry, *_ = self._stepped(program, carry, tensors, range(t, t + 1))
            return Moment(carry, seen.retaken())

    def _reversed(self, inputs: Leaves, end: int) -> Iterator[tuple[range, Moment]]:
        if self._unroll == 1:
            yield from super()._reversed(inputs, end)
        else:
            for steps in reversed(self._parts()):
                if steps.start < end:
                    yield steps, self._moments.at(steps.start)

    def _pulled(
        self, moment: Moment, inputs: Leaves, steps: range, cotangents: Cotangents
    ) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
        # Freed here like a graph; a second backward pass computes the step again.
        pull, saved, counted = self._saved.pop(steps.start, (None, [], []))
        if pull is None or any(c is not None for row in cotangents.losses for c in row):
            return self._pulled_singly(moment, inputs, steps, cotangents)
        if versions(saved) != counted:
            self._changed()
        found = pull.program([*saved, *present(self._dense(cotangents.carry))], ())
        self._ends = moment.carry.smooth
        return read_pulled(self.call, found, pull.present, pull.places, steps)

    def _pulled_start(self, inputs: Leaves, smooth: Sequence[Tensor | None]) -> dict[Input, Tensor]:
        if self._started is None:
            self._require_same(range(len(self._versions)) if self.call.state is None else ())
            with self._at_start.replayed():
                return pull_back_start(self.call, inputs, smooth)
        return self._started.pull_back(present(self._dense(smooth)), self._changed)

    def _dense(self, smooth: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the cotangents of the carry, with zeros for None."""
        return [torch.zeros_like(x) if c is None else c for c, x in zip(smooth, self._ends)]

    def _pulled_singly(
        self, moment: Moment, inputs: Leaves, steps: range, cotangents: Cotangents
    ) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
        """Return the same, from the adjoint of each step and the state before it."""
        moments, smooth, total = [moment], cotangents.carry, dict[Input, Tensor]()
        for t in steps[:-1]:
            moments.append(self._advanced(moments[-1], t, t + 1, inputs.constants))
        for at, losses, t in reversed(list(zip(moments, cotangents.losses, steps))):
            here = Cotangents(self._dense(smooth), [losses])
            program, arguments = self._adjoint(at, inputs.constants, t, here)
            self._require_same(program.held)
            with at.seen.replayed():
                found = program(arguments, self._held())
            has, places = program.form
            smooth, more = read_pulled(self.call, found, has, places, range(t, t + 1))
            self._ends = at.carry.smooth
            add_up(total, more)
        return smooth, total

    def _changed(self) -> None:
        self._require_same(range(len(self._versions)), otherwise="a result")

    def _require_same(self, held: Sequence[int], *, otherwise: str = "") -> None:
        """Raise if one of the tensors that the loss reaches was changed in place since the run."""
        held = () if self._writes else held  # written buffers are replayed
        now = versions(self._reach.tensors)
        require_unchanged(held, self._reach.names, self._versions, now, otherwise)

    def _swept(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        self._ends, count = self._last, len(self.outputs.carry.tensors())
        straight, self._straight = self._straight, None
        if straight is None or any(c is not None for c in cotangents[count:]):
            return super()._swept(inputs, cotangents)  # so does a second backward pass
        pairs = zip(cotangents, self.outputs.carry.tensors())
        given = Cotangents([c for c, x in pairs if is_smooth(x)], [])
        smooth, more = straight.pull_back(given)
        sums = Sums(self.call, inputs)
        sums.add(more)
        sums.add(self._pulled_start(Leaves(self.call, inputs), smooth))
        return sums.found()

    def _attached(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        raise NotTraceableError(
            f"{WHERE}: expected a gradient that is not differentiated again (create_graph=False, "
            'no torch.func transform), got one that is; use execute="eager".'
        )
