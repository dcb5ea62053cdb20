# SPDX-License-Identifier: Apache-2.0
"""The start of a traced run and its adjoint, traced once.

An optimizer makes its state with hundreds of Python calls, more under vmap, which take longer than
ten steps of a small problem. The traced start has only a few dozen operations.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.closure import ATOMS
from torchopt.diff.explicit.adjoint import pulled
from torchopt.diff.explicit.call import Call, Hole
from torchopt.diff.explicit.fingerprint import form_of
from torchopt.diff.explicit.forms import (
    EMPTY,
    distinct_tensors,
    fixed,
    form_key,
    present,
    with_counts,
)
from torchopt.diff.explicit.step import Carry, start
from torchopt.diff.explicit.trace import Kept, Program, Words, make_trace, versions
from torchopt.diff.explicit.variables import Input
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotTraceableError
from torchopt.torch_internals import draws_numbers

__all__ = ["Started", "TracedStart", "traced_start"]

_kept: Kept[TracedStart | None] = Kept()


@dataclass(frozen=True)
class Started:
    """The start of one run.

    Attributes:
        form: The traced start that it comes from.
        carry: Parameters and state, with tensors for the integers of the state.
        kept: The tensors that the adjoint needs.
        counted: Their versions.
    """

    form: TracedStart
    carry: Carry
    kept: list[Tensor]
    counted: list[int]

    def pull_back(
        self, cotangents: Sequence[Tensor], changed: Callable[[], None]
    ) -> dict[Input, Tensor]:
        """Return the cotangents of the inputs.

        Args:
            cotangents: Those of the smooth tensors of the carry.
            changed: Raises the error for a tensor that was changed in place.
        """
        if versions(self.kept) != self.counted:
            changed()
        found = self.form.pull([*self.kept, *cotangents], ())
        return {(i, None): c for i, c in zip(self.form.reached, found)}


@dataclass(frozen=True)
class TracedStart:
    """A program for the start of runs, and its adjoint.

    Attributes:
        taken: The positions of the inputs of a call that the program takes.
        program: Computes the tensors of the carry and those that the adjoint needs.
        pull: The adjoint.
        carry: The form of the carry.
        where: The position of each tensor of the carry among the results of the program.
        first: The form of the carry with the integers that the optimizer makes.
        reached: The positions of the inputs that have a cotangent.
        key: The `form_key` of the carry, from the first call on.
    """

    taken: tuple[int, ...]
    program: Program
    pull: Program
    carry: Carry
    where: tuple[int, ...]
    first: Carry
    reached: tuple[int, ...]
    key: Hashable = field(init=False)

    def __call__(self, tensors: Sequence[Tensor], held: Sequence[Tensor]) -> Started:
        """Return the start of a run with these inputs."""
        found = self.program([tensors[i] for i in self.taken], held)
        carry = self.carry.with_tensors([found[i] for i in self.where])
        if "key" not in self.__dict__:
            self.__dict__["key"] = form_key(carry)
        kept = list(found[max(self.where) + 1 :])
        return Started(self, carry, kept, versions(kept))


def traced_start(
    call: Call, key: Hashable, surroundings: Callable[[], Surroundings], words: Words
) -> TracedStart | None:
    """Return the traced start of a call's runs; None if it cannot be reused.

    It cannot be reused if it draws random numbers, depends on values, or continues from a state,
    whose counts differ each time.

    Args:
        call: The call.
        key: The key of all programs of the call.
        surroundings: Returns the surroundings of the optimizer.
        words: Words for messages.
    """
    leaves = call.params.leaves
    if call.state is not None or not all(isinstance(x, (Hole, *ATOMS)) for x in leaves):
        return None
    taken = (*(h.index for h in call.params.holes()), *call.hypers)
    wanted = set(call.wanted)
    forms = tuple((form_of(call.inputs[i]), i in wanted, call.dims[i]) for i in taken)
    form, _ = _kept.get(
        (key, forms, fixed(leaves)), lambda: _made(call, taken, surroundings(), words)
    )
    return form


def _made(
    call: Call, taken: tuple[int, ...], surroundings: Surroundings, words: Words
) -> TracedStart | None:
    wanted = set(call.wanted)
    at = [i for i in taken if i in wanted]
    with torch.no_grad(), surroundings.retaken().replayed():
        constants = [x.detach() for x in call.inputs]
        like = [torch.zeros_like(x) for x in start(call, call.optimizer, constants).smooth]

    def joint(*flat: Tensor) -> tuple[list[Tensor], Any]:
        tensors: list[Tensor] = [x.detach() for x in call.inputs]
        for i, x in zip(taken, flat):
            tensors[i] = x.detach().requires_grad_(i in wanted)
        with torch.enable_grad():
            first = start(call, call.optimizer_with(tensors), tensors)
        values = first.detached()
        carry = with_counts(values, call.params.spec)
        once, where = distinct_tensors(carry.tensors())
        # Each call of a compiled program would copy a tensor that was expanded to all tasks.
        once = [x.clone() if 0 in x.stride() else x for x in once]
        found = pulled(first.smooth, flat[len(taken) :], [tensors[i] for i in at])
        forms = [c.with_tensors([EMPTY] * len(c.tensors())) for c in (carry, values)]
        reached = tuple(i for i, c in zip(at, found) if c is not None)
        return [*once, *present(found)], (len(once), where, *forms, reached)

    examples = [*(call.inputs[i].detach() for i in taken), *like]
    try:
        with surroundings.retaken().replayed():
            states = surroundings.retaken()
            reach = call.loss, call.optimizer
            trace = make_trace(joint, examples, reach, words, states=states)
            if trace.writes or draws_numbers(trace.graph):
                return None
            count, where, carry, first, reached = trace.form
            cotangents = range(len(taken), len(examples))
            program, pull = trace.parted(count, cotangents, words, compiled=False)
    except NotTraceableError:
        return None
    return TracedStart(taken, program, pull, carry, where, first, reached)
