# SPDX-License-Identifier: Apache-2.0
"""Calls that repeat an earlier one with other values.

The first call of a form makes keys of everything that its program depends on, and trees of
everything that the program takes and returns. On small problems that takes longer than the program.
A repetition compares its arguments with those of the earlier call, and goes from one list of
tensors straight to the other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.fingerprint import Fingerprint, Settings, form_of
from torchopt.diff.explicit.forms import WAY_OUT, WHERE, Form, distinct_tensors, is_count
from torchopt.diff.explicit.given import Given, Pattern
from torchopt.diff.explicit.packing import Packing
from torchopt.diff.explicit.run import Run
from torchopt.diff.explicit.step import Carry
from torchopt.diff.explicit.stepper import Memory, Stepper
from torchopt.diff.explicit.straight import Caller, chained, pulled_through, require_unchanged
from torchopt.diff.explicit.taken import inputs_of
from torchopt.diff.explicit.trace import Program, versions
from torchopt.diff.explicit.traced_start import Started
from torchopt.diff.explicit.unrolled import Outputs
from torchopt.tree import is_smooth, tree_unflatten
from torchopt.tree_function import apply_sweep, is_transforming

__all__ = ["Repeated", "Repetitions", "is_repeatable"]

MOST = 8  # forms of calls that an inner loop repeats


def is_repeatable(program: Program) -> bool:
    """Return whether a repetition can use a program."""
    form: Form = program.form
    with_aux = any(isinstance(x, Tensor) for a in form.aux for x in a.leaves)
    return not with_aux and (form.pull is None or not any(form.grads))


class Repeated:
    """What all repetitions of a call share.

    Args:
        call: The call.
        reach: What its loss and its optimizer reach.
        started: The start of its run.
        program: The program of its steps.
        end: Parameters and state at the end.
        outputs: The form of its outputs.
        unroll: How many steps the program takes.
        run: The class of its run, for what a repetition does not keep.
        copies: Whether the program needs copies of its arguments, for their strides.
    """

    def __init__(
        self,
        call: Call,
        reach: Fingerprint,
        started: Started,
        program: Program,
        end: Carry,
        outputs: Outputs,
        unroll: int,
        run: Callable[..., Run],
        copies: bool,
    ) -> None:
        self.copies = copies
        self.call = replace(call, inputs=(), repeats=None)
        self.reach, self.run = reach, run
        self.settings = Settings()  # those of all repetitions: they are part of the key
        self.start, self.program, self.pull = started.form, program, program.form.pull
        self.unroll, self.count = unroll, call.steps // unroll
        self.is_direct = True
        self.pull_fits = False  # whether the arguments of the adjoint are known to fit it
        self.held = [reach.tensors[i] for i in program.held]
        places = dict.fromkeys((*program.held, *self.start.program.held))
        self.constants = [reach.tensors[i] for i in places]
        self.names = [reach.names[i] for i in places]
        self.optimizer_tensors = [call.inputs[i] for i in call.hypers]
        once, where = distinct_tensors(started.carry.tensors())
        self.once = [started.form.where[where.index(i)] for i in range(len(once))]
        self.begin = max(started.form.where) + 1
        self.packing = program.taken or Packing(len(once))
        taken = inputs_of(call, range(call.steps))
        self.used = [i for i, _ in taken]
        self.places = [taken[k][0] for k in self.pull.places] if self.pull else []
        self.missing = self.pull.present.count(False) if self.pull else 0
        self.dim = 0 if call.tasks is None else 1
        self._prepare(end, outputs)

    def _prepare(self, end: Carry, outputs: Outputs) -> None:
        """Find the place of each leaf of the result."""
        leaves, place = (*end.params, *end.state), iter(self.program.form.where)
        places = {k: next(place) for k, x in enumerate(leaves) if isinstance(x, Tensor)}
        first = self.start.first.state
        counts = [k for k, x in enumerate(first, len(end.params)) if is_count(x)]
        self.counts = [(k, places.pop(k)) for k in counts]
        self.shown = list(dict.fromkeys(places.values()))
        self.filled = [(k, self.shown.index(i)) for k, i in places.items()]
        self.leaves = [None if isinstance(x, Tensor) else x for x in leaves]
        smooth = [k for k, x in enumerate(leaves) if is_smooth(x)]
        self.smooth = [self.shown.index(places[k]) for k in smooth]
        self.zeros = [leaves[k].new_zeros(()).expand(leaves[k].shape) for k in smooth]
        self.specs = self.call.params.spec, end.state_spec, outputs.aux.spec
        self.aux = outputs.aux.leaves

    def filled_up(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Return the cotangents of the carry, with zeros for those that the adjoint leaves out."""
        remaining, pairs = iter(found), zip(self.pull.present, self.zeros)
        return [next(remaining) if p else zero.clone() for p, zero in pairs]

    def result(self, given: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return parameters, state, losses and aux of a repetition with these tensors."""
        inputs = (*given, *self.optimizer_tensors)
        run = _Repetition(self)
        if self.pull is not None:
            found = apply_sweep(run, *inputs)
        else:
            with torch.no_grad():
                found = run.evaluate(*inputs)
        leaves, count = list(self.leaves), len(self.call.params.leaves)
        for k, i in self.filled:
            leaves[k] = found[i]
        for (k, _), number in zip(self.counts, run.counts):
            leaves[k] = number
        params, state, aux = self.specs
        return (
            tree_unflatten(params, leaves[:count]),
            tree_unflatten(state, leaves[count:]),
            found[-1],
            tree_unflatten(aux, self.aux),
        )


class _Repetition:
    """One repetition, an implementation of `torchopt.tree_function.Sweep`."""

    def __init__(self, like: Repeated) -> None:
        self._like = like
        self._kept: list[Sequence[Tensor]] = []
        self._begun: Sequence[Tensor] = ()
        self._watched: list[Tensor] = []
        self._versions: tuple[list[int], list[int]] = ([], [])
        self.counts: list[int] = []

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the result."""
        like = self._like
        found = like.start.program([inputs[i] for i in like.start.taken], like.reach.tensors)
        before = like.packing.packed([found[i] for i in like.once])
        others = [*(inputs[i] for i in like.used), *like.held]
        program = Caller(like.program) if like.copies else like.program.function
        end, rests = chained(program, before, others, like.count)
        losses = [x for rest in rests for x in rest[: like.unroll]]
        if like.pull is not None:
            self._begun = found[like.begin :]
            self._kept = [rest[like.unroll :] for rest in rests]
            # Nothing else refers to the tensors between the first step and the last.
            self._watched = [*self._begun, *self._kept[0], *self._kept[-1]]
            self._versions = versions(self._watched), versions(like.constants)
        once = like.packing.unpacked(end)
        self.counts = [int(once[i]) for _, i in like.counts]
        # Parts of a buffer share its version, and the graph of the outputs refers to this object.
        shared = bool(like.packing.places)
        shown = [once[i].clone() if shared else once[i].detach() for i in like.shown]
        return (*shown, torch.stack(losses, like.dim))

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs."""
        like, kept, begun = self._like, self._kept, self._begun
        attached = torch.is_grad_enabled() or is_transforming()
        if attached or not kept or cotangents[-1] is not None:
            return self._pulled_by_run(inputs, cotangents, attached=attached)
        self._kept, self._begun = [], ()  # freed here like a graph
        if versions(self._watched) != self._versions[0]:
            self._require_unchanged("a result")
        self._watched = []
        given = [cotangents[i] for i in like.smooth]
        dense = [zero if c is None else c for c, zero in zip(given, like.zeros)]
        pull = like.pull.program
        packing = pull.taken or Packing(len(dense))
        size = packing.count - like.missing
        caller = Caller(pull)
        smooth, total = pulled_through(
            pull.function if like.pull_fits else caller,
            kept,
            packing.packed(dense),
            like.filled_up if like.missing else None,
            size,
        )
        like.pull_fits |= packing.is_whole and not caller.copies
        out: list[Tensor | None] = [None] * len(inputs)
        for i, c in zip(like.places, total):
            out[i] = c
        # The adjoint of the start may return parts of one buffer.
        more = like.start.pull([*begun, *packing.unpacked(smooth)], ())
        for i, c in zip(like.start.reached, more):
            present = out[i]
            out[i] = c.clone() if present is None else present.add_(c)
        for i in like.call.wanted:
            out[i] = torch.zeros_like(inputs[i]) if out[i] is None else out[i]
        return tuple(out)

    def _pulled_by_run(
        self,
        inputs: tuple[Tensor, ...],
        cotangents: tuple[Tensor | None, ...],
        *,
        attached: bool,
    ) -> tuple[Tensor | None, ...]:
        """Return the same from another run, for what needs more than this one kept."""
        like = self._like
        self._require_unchanged()
        # The optimizer's tensors are found by identity, and hooks for saved tensors may copy.
        count = len(inputs) - len(like.optimizer_tensors)
        call = replace(like.call, inputs=(*inputs[:count], *like.optimizer_tensors))
        keeping = {"keep_gradients": True, "keep_all": True}  # as for keep="all"
        of_carry = [cotangents[i] for _, i in like.filled]
        with like.settings.restored(WHERE, WAY_OUT):
            like.reach.require_same(call.reach(), WHERE, WAY_OUT, tensors=True)
            run = like.run(call, call.steps, **keeping, unroll=like.unroll)
            if not attached:  # else the run raises
                run.evaluate(*inputs)
            like.is_direct &= cotangents[-1] is None  # further runs keep what is needed
            return run.pull_back(inputs, (*of_carry, cotangents[-1]))

    def _require_unchanged(self, otherwise: str = "") -> None:
        names, now = self._like.names, versions(self._like.constants)
        require_unchanged(range(len(now)), names, self._versions[1], now, otherwise)


class Repetitions:
    """The calls that an inner loop repeats: those used last. Copies start empty.

    Several threads may use it at the same time: the tuple is replaced, never changed.
    """

    not_searched = True  # by `captured`, like `Memory`

    def __init__(self) -> None:
        self._known: tuple[_Known, ...] = ()

    def __reduce__(self) -> Any:
        return Repetitions, ()

    def find(self, given: Given, memory: Memory, loss: Any) -> Repeated | None:
        """Return the call that one with these arguments repeats.

        Args:
            given: The arguments.
            memory: The cache of the loop.
            loss: The loss.
        """
        known = self._known
        if not known:
            return None
        reached = memory.loss_now(loss)
        if known[0].loss is not reached:  # what the loss reached before does not stay alive
            self._known = known = tuple(x for x in known if x.loss is reached)
        return next((x.call for x in known if x.is_repeated_by(given, reached)), None)

    def note(self, given: Given, call: Call, memory: Memory) -> None:
        """Remember a call that was run, if others may repeat it."""
        stepper = memory.kept(call.optimizer)
        if not call.repeats or stepper is None:
            return
        found, loss, own = call.repeats.pop(), memory.loss_now(call.loss), stepper.now()
        now, then = memory.reach(call.loss, stepper), found.reach
        if now.key != then.key or any(map(operator.is_not, now.tensors, then.tensors)):
            return  # something was changed during the run
        forms = list(map(form_of, own.tensors))
        known = _Known(Pattern(given), loss, stepper, own, forms, found)
        self._known = (known, *self._known[: MOST - 1])


@dataclass(frozen=True, eq=False)
class _Known:
    """A call that may be repeated, and what repetitions have in common with it.

    Attributes:
        pattern: Its arguments.
        loss: What the loss reaches.
        stepper: The optimizer.
        own: What the optimizer reaches.
        forms: The forms of its tensors.
        call: The call.
    """

    pattern: Pattern
    loss: Fingerprint
    stepper: Stepper
    own: Fingerprint
    forms: list[Any]
    call: Repeated

    def is_repeated_by(self, given: Given, loss: Fingerprint) -> bool:
        """Return whether a call with these arguments and this loss is a repetition."""
        if self.loss is not loss or not self.pattern.matches(given):
            return False
        # What torchopt makes from the same arguments changes only with the tensors among them.
        same = self.stepper.is_given or self.stepper.now() is self.own
        if not same or list(map(form_of, self.own.tensors)) != self.forms:
            return False
        read = (*self.call.held, *self.call.optimizer_tensors)  # by compiled code, from memory
        return not any(x.is_neg() or x.is_conj() for x in read)
