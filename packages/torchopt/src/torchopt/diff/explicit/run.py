# SPDX-License-Identifier: Apache-2.0
"""A run that keeps some of its states, and its reverse-mode derivative."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.adjoint import Cotangents, gradient, pull_back_start, pull_back_steps
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.checks import require_no_differences
from torchopt.diff.explicit.memory import CountBytes
from torchopt.diff.explicit.moments import Moment, Moments, constant, updated
from torchopt.diff.explicit.schedule import actions, kept_by_the_run
from torchopt.diff.explicit.step import Aux, Carry, start, update
from torchopt.diff.explicit.tail import Tail
from torchopt.diff.explicit.unrolled import Outputs, run_attached
from torchopt.diff.explicit.variables import Input, Leaves
from torchopt.diff.surroundings import Surroundings
from torchopt.torch_internals import top_saved_tensor_hooks
from torchopt.tree import is_smooth
from torchopt.tree_function import is_transforming, linearize

__all__ = ["Run", "Sums", "graph_size"]

ROOM = 2**22  # bytes that the graph of several steps may take
APART = 8  # steps between kept states if the gradients between them are kept too


class Run:
    """One run of a call, an implementation of `torchopt.tree_function.Sweep`.

    Args:
        call: The call.
        snapshots: How many states are kept, including the one before the first differentiated
            step. The state before the last step is kept in addition.
        room: Bytes that the graph of several steps may take; 0: each step is reversed alone.
    """

    def __init__(self, call: Call, snapshots: int, room: int = 0) -> None:
        self.call, self._room = call, room
        self._at_once = 1  # how many steps are reversed in one graph
        self.snapshots = min(snapshots, call.steps - call.first)
        self.outputs: Outputs  # the form of what `evaluate` returned
        self._seen: Any  # the surroundings at the start
        self._tail: Any = None  # a `Tail` or an object with its methods
        self._moments = Moments(call)

    # -- the run itself

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the result and keep some of the states."""
        call = self.call
        tensors = [x.detach() for x in inputs]
        # Outside any graph, the optimizer's own tensors can be used.
        optimizer = call.optimizer_with(tensors) if torch.is_grad_enabled() else call.optimizer
        places = {call.first, *self._places(), call.steps - 1}
        self._seen = seen = Surroundings(call.loss, tensors, beside=call.optimizer).retaken()
        losses, aux = [], []
        carry = start(call, optimizer, tensors).detached()
        if drawn := seen.have_moved():  # the loss draws the numbers that follow
            seen = seen.retaken()
        tail: Tail | None = None
        begin = call.steps - 1 if self._keeps_graphs() else call.steps
        for t in range(call.steps):
            if t in places and t > 0:
                seen = seen.retaken()
            if t == begin:
                self._tail = tail = Tail(call, carry, tensors, t)
            before, kept = carry, None
            if tail is not None:
                carry, value, extra = tail.step(t)
            else:
                grads, value, extra = gradient(call, carry, tensors, t)
                kept = self._kept(grads) if t in places else None
                states = [] if kept is None else seen.generators()
                carry = constant(update(call, optimizer, grads, before))
                if kept is not None and not all(map(torch.equal, states, seen.generators())):
                    # The adjoint of the update must draw the same numbers, after the loss.
                    kept = None
            if t in places:
                state = None if self._follows(t, kept, drawn=drawn) else before
                self._moments.keep(t, Moment(state, seen, kept))
            if t == call.first and tail is None and self._is_small(carry):
                begin = self._measured(before, tensors, seen)
            losses.append(value)
            aux.append(extra)
        if tail is not None:
            tail.require_no_closure()
        self._seen.watch(losses[call.first])
        found = Outputs.of(call, carry, losses, aux)
        self.outputs = self._with(found, [x.new_empty(0) for x in self._flat(found)])
        return self._flat(found)

    def _measured(self, carry: Carry, tensors: list[Tensor], seen: Surroundings) -> int:
        """Return the first of the last steps whose graph is kept.

        The first step is taken again with its graph. Its size decides how many steps keep their
        graph, and how many of the other steps are reversed together.
        """
        call = self.call
        if (size := graph_size(call)) is None:
            with CountBytes(*tensors) as count, seen.retaken(silent=True).replayed():
                tail = Tail(call, carry, tensors, call.first)
                tail.step(call.first)
                size = call.sizes[_form(call)] = max(1, int(count.now))
        self._at_once = max(1, self._room // (2 * size))
        kept = max(1, self._room // size) if self._keeps_graphs() else 0
        return max(call.first + 1, call.steps - kept)

    def _follows(self, step: int, grads: list[Any] | None, *, drawn: bool) -> bool:
        """Return whether the state before a step is recomputed from an earlier one and gradients.

        For a model with blocks, an update is fast compared with a step, and a gradient is smaller
        than a state.
        """
        call = self.call
        if not call.blocks or call.host or self.snapshots < call.steps - call.first:
            return False
        if grads is None or (step - call.first) % APART:
            return grads is not None and self._moments[step - 1].grads is not None
        return step == 0 and call.state is None and not drawn

    def _kept(self, grads: list[Any]) -> list[Any] | None:
        # The adjoint of a step begins with its gradient, except in reverse mode.
        return grads if self.call.derivative != "reverse" else None

    def _places(self) -> tuple[int, ...]:
        return kept_by_the_run(self.call.first, self.call.steps, self.snapshots)

    @staticmethod
    def _flat(outputs: Outputs) -> tuple[Tensor, ...]:
        return (*outputs.carry.tensors(), outputs.losses, *_tensors(outputs.aux))

    def require_repeatable(self) -> None:
        """Raise if the loss changes something that cannot be restored to recompute a step."""
        self._seen.require_copied()

    def outputs_with(self, tensors: Sequence[Tensor]) -> Outputs:
        """Return the outputs of the run from the tensors that `evaluate` returned."""
        return self._with(self.outputs, tensors)

    @staticmethod
    def _with(form: Outputs, tensors: Sequence[Tensor]) -> Outputs:
        remaining = iter(tensors)
        count = len(form.carry.tensors())
        carry = form.carry.with_tensors(list(itertools.islice(remaining, count)))
        losses = next(remaining)
        leaves = tuple(
            next(remaining)
            if isinstance(x, Tensor)
            else tuple(next(remaining) if isinstance(y, Tensor) else y for y in x)
            if isinstance(x, tuple)
            else x
            for x in form.aux.leaves
        )
        return Outputs(carry, losses, Aux(leaves, form.aux.spec))

    # -- the derivative

    def pull_back(
        self,
        inputs: tuple[Tensor, ...],
        cotangents: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents of the inputs."""
        if self._seen.is_touched() and not is_transforming():
            self._require_same_loss([x.detach() for x in inputs])
        if torch.is_grad_enabled() or is_transforming():
            return self._attached(inputs, cotangents)
        return self._swept(inputs, cotangents)

    def _require_same_loss(self, tensors: list[Tensor]) -> None:
        """Raise if the first step would give another loss now."""
        moment = self._moments.at(self.call.first)
        with moment.seen.replayed():
            _, value, _ = gradient(self.call, moment.carry, tensors, self.call.first)
        if names := self._seen.changed(value):
            raise RuntimeError(
                "inner_loop: expected tensors that are not changed between the run and its "
                f"backward pass, got {names[0]}, which was changed in place, so that a step "
                "would differ; change a clone of it."
            )

    def _attached(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangents with a graph, from the unrolled loop."""
        call = self.call
        require_no_differences(call, "a derivative that is not differentiated again")

        def run(*wanted: Tensor) -> tuple[Tensor, ...]:
            tensors = list(inputs)
            for i, x in zip(call.wanted, wanted):
                tensors[i] = x
            found = self._flat(run_attached(call, tensors))
            return tuple(found[i] for i in given)

        given = [i for i, c in enumerate(cotangents) if c is not None]
        present = [c for c in cotangents if c is not None]
        aliases = [inputs[i].view_as(inputs[i]) for i in call.wanted]
        out: list[Tensor | None] = [None] * len(inputs)
        with self._seen.replayed():
            if is_transforming():
                _, pull = linearize(run, *aliases)
                found = pull(tuple(present))
            else:
                values = run(*aliases)
                pairs = [(y, c) for y, c in zip(values, present) if y.requires_grad]
                found = torch.autograd.grad(
                    [y for y, _ in pairs],
                    aliases,
                    [c for _, c in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
        for i, x in zip(call.wanted, found):
            out[i] = x
        return tuple(out)

    def _swept(
        self,
        inputs: tuple[Tensor, ...],
        cotangents: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        call, form = self.call, self.outputs
        tensors = [x.detach() for x in inputs]
        remaining = iter(cotangents)
        of_carry = [next(remaining) for _ in form.carry.tensors()]
        smooth = [c for c, x in zip(of_carry, form.carry.tensors()) if is_smooth(x)]
        of_losses = next(remaining)
        of_aux = list(remaining)
        sums, leaves = Sums(call, tensors), Leaves(call, tensors)
        dim = 0 if call.tasks is None else 1

        def given(step: int) -> list[Tensor | None]:
            of_loss = None if of_losses is None else of_losses.select(dim, step)
            return [of_loss, *_aux_at(form.aux, of_aux, step, dim)]

        end = call.steps
        if (tail := self._tail) is not None:  # a second backward pass computes these steps again
            self._tail, end = None, tail.first
            here = Cotangents(smooth, list(map(given, range(end, call.steps))))
            smooth, more = tail.pull_back(here)
            del tail
            sums.add(more)
        for steps, moment in self._reversed(leaves, end):
            here = Cotangents(smooth, list(map(given, steps)))
            smooth, more = self._pulled(moment, leaves, steps, here)
            sums.add(more)
        if call.first == 0:
            sums.add(self._pulled_start(leaves, smooth))
        if call.judge is not None:
            call.judge.settle()
        return sums.found()

    def _pulled(
        self, moment: Moment, inputs: Leaves, steps: range, cotangents: Cotangents
    ) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
        """Return the cotangents of the state before the steps and of the inputs."""
        return pull_back_steps(self.call, moment, inputs, steps, cotangents, moment.seen.replayed)

    def _pulled_start(self, inputs: Leaves, smooth: Sequence[Tensor | None]) -> dict[Input, Tensor]:
        """Return the cotangents of the inputs that flow through the start of the run."""
        with self._seen.replayed():  # an optimizer may draw its state
            return pull_back_start(self.call, inputs, smooth)

    def _keeps_graphs(self) -> bool:
        """Return whether the last step, at least, keeps its graph: the first that is reversed."""
        # A second backward pass needs the states of all steps.
        return self._may_keep() and self.snapshots >= self.call.steps - self.call.first

    def _may_keep(self) -> bool:
        call = self.call
        if not self._room or call.derivative != "reverse" or call.host:
            return False
        return top_saved_tensor_hooks(True) is None  # they would apply to a graph kept here

    def _is_small(self, carry: Carry) -> bool:
        """Return whether several steps may be reversed together, which helps if they are short."""
        return self._may_keep() and 8 * sum(x.nbytes for x in carry.tensors()) <= self._room

    def _reversed(self, inputs: Leaves, end: int) -> Iterator[tuple[range, Moment]]:
        """Yield the differentiated steps before `end` in reverse order, one or several at a time.

        With each range of steps comes the state before it.
        """
        call, last = self.call, self.call.steps - 1
        moments, places = self._moments, sorted(self._moments)
        plan = actions(call.first, call.steps, self.snapshots)
        if last in moments:  # the run itself has done the part of the plan before the first reverse
            if all(b - a <= self._at_once for a, b in itertools.pairwise(places)):
                yield from self._together(places, end)
                return
            yield range(last, last + 1), moments.last(last)
            next(action for action, _ in plan if action == "reverse")
            if last not in self._places():
                moments.pop(last, None)
        # The plan stores other states in their place; a second backward pass starts from the first.
        self._moments = Moments(call)
        self._moments[call.first] = moments[call.first]
        here, position = moments.at(call.first), call.first
        for action, t in plan:
            if action == "restore":
                here, position = moments.at(t), t
            elif action == "advance":
                here = self._advanced(here, position, t, inputs.constants)
                position = t
            elif action == "store":
                moments.keep(t, here)
            elif action == "free":
                moments.pop(t, None)
            else:
                yield range(t, t + 1), here

    def _together(self, places: list[int], end: int) -> Iterator[tuple[range, Moment]]:
        """Yield all steps before `end` in reverse order, as many together as take little memory."""
        while end > self.call.first:
            begin = places[bisect.bisect_left(places, end - self._at_once)]
            yield range(begin, end), self._moments.last(begin)
            end = begin

    def _advanced(self, moment: Moment, step: int, target: int, tensors: list[Tensor]) -> Moment:
        """Return the state before the step `target`, starting from the one before `step`."""
        carry, seen = moment.carry, moment.seen
        with seen.replayed():
            for t in range(step, target):
                grads, _, _ = gradient(self.call, carry, tensors, t)
                carry = updated(self.call, carry, grads)
            return Moment(carry, seen.retaken())


def graph_size(call: Call) -> int | None:
    """Return the bytes of the graph of a step, if an earlier call has measured them."""
    return call.sizes.get(_form(call))


def _form(call: Call) -> Any:
    return tuple((x.shape, x.dtype) for x in call.inputs)


def _tensors(aux: Aux) -> list[Tensor]:
    return [
        y
        for x in aux.leaves
        for y in (x if isinstance(x, tuple) else (x,))
        if isinstance(y, Tensor)
    ]


def _aux_at(
    form: Aux, cotangents: Sequence[Tensor | None], step: int, dim: int
) -> list[Tensor | None]:
    """Return the cotangents of the smooth tensors in the aux of a step."""
    remaining = iter(cotangents)
    out = []
    for x in form.leaves:
        if isinstance(x, Tensor):
            c = next(remaining)
            if is_smooth(x):
                out.append(None if c is None else c.select(dim, step))
        elif isinstance(x, tuple):
            every = [next(remaining) if isinstance(y, Tensor) else None for y in x]
            if is_smooth(x[step]):
                out.append(every[step])
    return out


class Sums:
    """The cotangents of the inputs, summed over the steps."""

    def __init__(self, call: Call, tensors: Sequence[Tensor]) -> None:
        self._call, self._tensors = call, tensors
        self._sums: list[Tensor | None] = [None] * len(tensors)

    def add(self, found: dict[Input, Tensor]) -> None:
        """Add the cotangents that some steps, or the start, have found."""
        for (i, step), c in found.items():
            present = self._sums[i]
            if step is not None:
                if present is None:
                    self._sums[i] = present = torch.zeros_like(self._tensors[i])
                present[step] += c
            elif present is None:
                self._sums[i] = c.clone()
            else:
                present += c

    def found(self) -> tuple[Tensor | None, ...]:
        """Return the sum for each input."""
        # With a window, inputs that only earlier steps use are constants with derivative zero.
        for i in self._call.wanted:
            if self._sums[i] is None:
                self._sums[i] = torch.zeros_like(self._tensors[i])
        return tuple(self._sums)
