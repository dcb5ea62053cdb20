# SPDX-License-Identifier: Apache-2.0
"""A run whose steps, and the adjoints of them, are traced once and run for any number of steps."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.adjoint import (
    AtStep,
    Cotangents,
    Input,
    Leaves,
    gradient,
    pull_back_steps,
)
from torchopt.diff.explicit.call import Call, Hole
from torchopt.diff.explicit.fingerprint import fingerprint
from torchopt.diff.explicit.forms import (
    WHERE,
    Form,
    Nothing,
    Pull,
    call_key,
    distinct_tensors,
    filled,
    form_key,
    inputs_key,
    present,
    with_counts,
    with_ints,
)
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.run import Run
from torchopt.diff.explicit.step import Aux, Carry, start, update
from torchopt.diff.explicit.trace import Program, Words, make_program, make_trace, traced, versions
from torchopt.diff.explicit.unrolled import Outputs
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotTraceableError
from torchopt.torch_internals import draws_numbers, repeats_removed

__all__ = ["TracedRun"]

WORDS = Words(WHERE, 'use execute="eager"')


class TracedRun(Run):
    """A run of traced programs.

    Args:
        call: The call.
        snapshots: How many states are kept; see `Run`.
        compiled: Whether the programs are compiled.
        keep_gradients: Whether a gradient is kept beside each state.
        keep_all: Whether what a step computes is kept for its adjoint.
    """

    def __init__(
        self,
        call: Call,
        snapshots: int,
        *,
        compiled: bool,
        keep_gradients: bool,
        keep_all: bool = False,
    ) -> None:
        super().__init__(call, snapshots)
        self._compiled, self._keep_gradients = compiled, keep_gradients
        self._keep_all = keep_all
        self._saved: dict[int, tuple[Pull, list[Tensor], list[int]]] = {}
        self._reach = fingerprint(call.loss, call.optimizer)
        self._versions = versions(self._reach.tensors)
        self._common = self._reach.key, compiled, call_key(call)
        self._adjoints: dict[Hashable, Program] = {}
        self._seeing = self._writes = self._uniform = False
        self._last: list[Tensor] = []
        self._ends: list[Tensor] = []

    # -- what its programs depend on

    def _holes(self, step: int) -> list[Hole]:
        return [*self.call.used_at(step), *(Hole(i) for i in self.call.hypers)]

    def _inputs_at(self, tensors: Sequence[Tensor], step: int) -> list[Tensor]:
        """Return the inputs that a step takes."""
        return [
            tensors[h.index][step] if h.by_step else tensors[h.index] for h in self._holes(step)
        ]

    def _with_given(self, given: Sequence[Tensor], step: int) -> list[Any]:
        """Return a list like the inputs of the call, with those that a step takes."""
        out: list[Any] = [x.detach() for x in self.call.inputs]
        for h, x in zip(self._holes(step), given):
            out[h.index] = AtStep({step: x}) if h.by_step else x
        return out

    def _key(self, carry: Carry, step: int) -> Hashable:
        return form_key(carry), inputs_key(self.call, self._holes(step), step), self._common

    def _make(self, function: Any, examples: Sequence[Tensor]) -> Program:
        call = self.call
        program = make_program(
            function,
            examples,
            self._seen,
            (call.loss, call.optimizer),
            WORDS,
            compiled=self._compiled,
        )
        if (program.draws or program.writes) and call.derivative == "first_order":
            raise NotTraceableError(
                f'{WHERE}: expected derivative "reverse" or "mixed" for a loss that draws random '
                'numbers or writes buffers, got "first_order"; use execute="eager".'
            )
        return program

    def _described(self) -> str:
        call = self.call
        shapes = [tuple(call.inputs[h.index].shape) for h in call.params.holes()][:3]
        name = getattr(call.loss, "__qualname__", type(call.loss).__name__)
        how = "compiled" if self._compiled else "not compiled"
        return f'{name} ({how}, "{call.derivative}", parameters {shapes})'

    # -- its programs

    def _program(self, carry: Carry, tensors: Sequence[Tensor], step: int) -> Program:
        once, where = distinct_tensors(carry.tensors())
        inputs = self._inputs_at(tensors, step)

        def stepped(*flat: Tensor) -> tuple[list[Tensor], Form]:
            before = carry.with_tensors([flat[i] for i in where])
            return self._results(before, self._with_given(flat[len(once) :], step), step)[:2]

        def make() -> Program:
            whole = self._whole(carry, [*once, *inputs], step) if self._keep_all else None
            return whole or self._make(stepped, [*once, *inputs])

        key = ("step", self._keep_all, self._key(carry, step))
        return traced(key, f"a step of {self._described()}", make)

    def _results(
        self, before: Carry, full: list[Any], step: int, *, with_gradient: bool = True
    ) -> tuple[list[Tensor], Form, list[Any]]:
        """Return the tensors that a step results in, the form of them, and the gradient."""
        call = self.call
        grads, value, aux = gradient(call, before, full, step)
        after = update(call, call.optimizer_with(full), grads, before).detached()
        returned = grads if with_gradient else [None] * len(grads)
        others = (x for x in (*aux.leaves, *returned) if isinstance(x, Tensor))
        distinct, _ = distinct_tensors(after.tensors())
        return [*distinct, value, *others], Form.of(before, after, aux, returned), grads

    def _whole(self, carry: Carry, given: list[Tensor], step: int) -> Program | None:
        """Return the program of a step that keeps what its adjoint takes, and in its form that.

        None where the loss draws random numbers, or anything is written in place: parts of the
        program run later than others.
        """
        once, where = distinct_tensors(carry.tensors())
        size = len(given)

        def stepped(flat: Sequence[Tensor]) -> tuple[Any, ...]:
            before = carry.with_tensors([flat[i] for i in where])
            full = self._with_given(flat[len(once) : size], step)
            return before, full, *self._results(before, full, step, with_gradient=False)

        def joint(*flat: Tensor) -> tuple[list[Tensor], Any]:
            before, full, results, form, grads = stepped(flat)
            here = Cotangents([*flat[size:]], [[None] * (1 + len(form.aux.smooth))])
            found, pulled = self._pulled_flat(self.call, before, full, step, grads, here)
            return [*results, *found], (len(results), form, pulled)

        with self._seen.retaken().replayed():
            _, _, results, form, _ = stepped(given)
            like = [torch.zeros_like(x) for x in form.read(results)[0].smooth]
        reach = self.call.loss, self.call.optimizer
        with self._seen.retaken().replayed():
            trace = make_trace(joint, [*given, *like], reach, WORDS, states=self._seen.retaken())
            if trace.writes or draws_numbers(trace.graph) or not repeats_removed(trace.graph):
                return None
            count, form, pulled = trace.form
            cotangents = range(size, size + len(like))
            program, pull = trace.parted(count, cotangents, WORDS, compiled=self._compiled)
        return replace(program, form=replace(form, pull=Pull(pull, *pulled)))

    def _pulled_flat(
        self,
        call: Call,
        before: Carry,
        full: list[Any],
        step: int,
        grads: Sequence[Any] | None,
        cotangents: Cotangents,
    ) -> tuple[list[Tensor], tuple[list[bool], list[int]]]:
        """Return the cotangents of the carry and of the inputs, and which these are."""
        out, by_input = pull_back_steps(
            call,
            before,
            Leaves.of(call, full),
            range(step, step + 1),
            grads,
            cotangents,
            contextlib.nullcontext,
        )
        places = {h.index: k for k, h in enumerate(self._holes(step))}
        form = [c is not None for c in out], [places[i] for i, _ in by_input]
        return [*present(out), *by_input.values()], form

    def _first(self, carry: Carry, tensors: Sequence[Tensor]) -> Program:
        """Return the program of the first step, which says what the others may be."""
        program = self._program(carry, tensors, 0)
        self._seeing, self._writes = program.draws or program.writes, program.writes
        self._uniform = program.form.stable and len(self.call.batches) == 1
        return program

    def _adjoint(
        self, moment: Moment, tensors: Sequence[Tensor], step: int, here: Cotangents
    ) -> tuple[Program, list[Tensor]]:
        """Return the program of the adjoint of a step, and its arguments."""
        carry = with_counts(moment.carry, self.call.params.spec)
        once, where = distinct_tensors(carry.tensors())
        # What draws random numbers, or writes buffers, does so once, in the order of the step.
        mixed = self.call.derivative == "mixed" and not self._seeing
        call = self.call if mixed or self.call.derivative != "mixed" else _reverse(self.call)
        forms = [
            None if values is None else [x is not None for x in values]
            for values in (moment.grads, here.losses[0])
        ]
        parts = [
            once,
            self._inputs_at(tensors, step),
            present(moment.grads or ()),
            present(here.carry),
            present(here.losses[0]),
        ]
        lengths = [len(part) for part in parts]

        def pulled(*flat: Tensor) -> tuple[list[Tensor], Any]:
            remaining = iter(flat)
            before, inputs, grads, smooth, losses = (
                [next(remaining) for _ in range(n)] for n in lengths
            )
            return self._pulled_flat(
                call,
                carry.with_tensors([before[i] for i in where]),
                self._with_given(inputs, step),
                step,
                None if moment.grads is None else filled(moment.grads, grads),
                Cotangents([*smooth], [filled(here.losses[0], losses)]),
            )

        arguments = [x for part in parts for x in part]
        short = (*(None if x is None else tuple(x) for x in forms), mixed)
        program = self._adjoints.get(short) if self._uniform else None
        if program is None:
            program = traced(
                ("adjoint", short, self._key(carry, step)),
                f"the adjoint of a step of {self._described()}",
                lambda: self._make(pulled, arguments),
            )
            self._adjoints[short] = program
        return program, arguments

    # -- the run

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors that the run ends with; keep some of its states."""
        call = self.call
        tensors = [x.detach() for x in inputs]
        places = {call.first, *self._places(), call.steps - 1}
        self._seen = Surroundings(call.loss, tensors, beside=call.optimizer).retaken()
        seen: Any = self._seen
        first = start(call, call.optimizer_with(tensors), tensors).detached()
        carry = with_counts(first, call.params.spec)
        program, losses, aux = self._first(carry, tensors), [], []
        for t in range(call.steps):
            if not self._seeing:
                seen = Nothing()
            elif t in places and t > 0:
                seen = seen.retaken()
            before = carry
            carry, value, extra, grads, rest = self._stepped(program, before, tensors, t)
            pull = program.form.pull
            if pull is not None:
                self._saved[t] = pull, rest, versions(rest)
            if t in places:
                kept = grads if self._keep_gradients and pull is None else None
                self._moments.keep(t, Moment(before, seen, kept))
            losses.append(value)
            aux.append(extra)
            if t + 1 < call.steps:
                program = self._next(program, carry, tensors, t + 1)
        carry = with_ints(carry, first)
        self._last = carry.smooth
        found = Outputs.of(call, carry, losses, aux)
        self.outputs = self._with(found, [x.new_empty(0) for x in self._flat(found)])
        return self._flat(found)

    def _next(self, program: Program, carry: Carry, tensors: list[Tensor], step: int) -> Program:
        """Return the program of the step after one of `program`."""
        if program.form.stable and len(self.call.batches) == 1:
            return program
        return self._program(carry, tensors, step)

    def _stepped(
        self, program: Program, carry: Carry, tensors: list[Tensor], step: int
    ) -> tuple[Carry, Tensor, Aux, list[Any], list[Tensor]]:
        arguments = [*distinct_tensors(carry.tensors())[0], *self._inputs_at(tensors, step)]
        form: Form = program.form
        return form.read(program(arguments, self._held()))

    def _held(self) -> tuple[Tensor, ...]:
        """Return the tensors that the loss and the optimizer reach."""
        if not self._writes:
            return self._reach.tensors
        # Where buffers are replayed they are other tensors.
        return fingerprint(self.call.loss, self.call.optimizer).tensors

    def _advanced(self, moment: Moment, step: int, target: int, tensors: list[Tensor]) -> Moment:
        carry, seen = with_counts(moment.carry, self.call.params.spec), moment.seen
        with seen.replayed():
            program = self._program(carry, tensors, step)
            for t in range(step, target):
                carry, *_ = self._stepped(program, carry, tensors, t)
                if t + 1 < target:
                    program = self._next(program, carry, tensors, t + 1)
            return Moment(carry, seen.retaken())

    def _pulled(
        self, moment: Moment, inputs: Leaves, steps: range, cotangents: Cotangents
    ) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
        (step,) = steps
        smooth: list[Tensor | None] = [
            torch.zeros_like(x) if c is None else c for c, x in zip(cotangents.carry, self._ends)
        ]
        # Freed here, as a graph is; another backward pass computes the step again.
        pull, saved, counted = self._saved.pop(step, (None, [], []))
        if pull is not None and all(c is None for c in cotangents.losses[0]):
            if versions(saved) != counted:
                self._require_same(range(len(self._versions)), otherwise="a result")
            found = iter(pull.program([*saved, *present(smooth)], ()))
            has, places = pull.present, pull.places
        else:
            here = Cotangents(smooth, cotangents.losses)
            program, arguments = self._adjoint(moment, inputs.constants, step, here)
            self._require_same(program.held)
            with moment.seen.replayed():
                found = iter(program(arguments, self._held()))
            has, places = program.form
        self._ends = moment.carry.smooth
        out = [next(found) if p else None for p in has]
        holes = [self._holes(step)[k] for k in places]
        return out, {(h.index, step if h.by_step else None): c for h, c in zip(holes, found)}

    def _require_same(self, held: Sequence[int], *, otherwise: str = "") -> None:
        """Raise if one of the tensors that the loss reaches was changed in place since the run."""
        now = [] if self._writes else versions(self._reach.tensors)  # what is written is replayed
        changed = (self._reach.names[i] for i in held if now and now[i] != self._versions[i])
        if name := next(changed, otherwise):
            raise RuntimeError(
                f"{WHERE}: expected tensors that are not changed between the run and its backward "
                f"pass, got {name}, which was changed in place; change a clone of it."
            )

    def _swept(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        self._ends = self._last
        return super()._swept(inputs, cotangents)

    def _attached(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        raise NotTraceableError(
            f"{WHERE}: expected a gradient that is not differentiated again (create_graph=False, "
            'no torch.func transform), got one that is; use execute="eager".'
        )


def _reverse(call: Call) -> Call:
    return replace(call, derivative="reverse", blocks=())
