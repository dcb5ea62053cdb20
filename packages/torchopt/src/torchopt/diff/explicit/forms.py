# SPDX-License-Identifier: Apache-2.0
"""What the program of a step takes and returns, as flat lists of tensors."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.closure import ATOMS
from torchopt.diff.explicit.call import Call, Hole
from torchopt.diff.explicit.fingerprint import fingerprint, form_of, settings
from torchopt.diff.explicit.step import Aux, Carry
from torchopt.diff.explicit.trace import Program
from torchopt.errors import NotTraceableError

__all__ = [
    "WHERE",
    "Form",
    "Nothing",
    "Pull",
    "call_key",
    "described",
    "distinct_tensors",
    "filled",
    "fixed",
    "form_key",
    "present",
    "with_counts",
    "with_ints",
]

WHERE = "inner_loop: execute"


@dataclass(frozen=True)
class Pull:
    """The adjoint of a step, from what the program of the step kept.

    Attributes:
        program: From that and the cotangents of the smooth tensors of the carry to cotangents.
        present: Which smooth tensors of the carry before have one.
        places: Which inputs of the step the others belong to.
        apart: Whether the start of the run depends on no tensor of the optimizer.
    """

    program: Program
    present: list[bool]
    places: list[int]
    apart: bool


@dataclass(frozen=True)
class Form:
    """What the program of steps returns: the carry, the losses, their aux and a gradient.

    Attributes:
        carry: The carry, with tensors for the places of them.
        aux: The aux of the loss in each step, in the same way.
        grads: Which leaves of the parameters have a gradient.
        where: Which of the first results each tensor of the carry is.
        stable: Whether the carry has the form of the one before, so that the program serves again.
        pull: The adjoint, if the program also returns what that takes.
    """

    carry: Carry
    aux: tuple[Aux, ...]
    grads: tuple[bool, ...]
    where: tuple[int, ...]
    stable: bool
    pull: Pull | None = None

    @staticmethod
    def of(before: Carry, after: Carry, aux: Sequence[Aux], grads: Sequence[Any]) -> Form:
        """Return the form of a step."""
        empty = torch.empty(0)
        unlike = [
            tuple(x for x in (*c.params, *c.state) if not isinstance(x, Tensor))
            for c in (before, after)
        ]
        if before.state_spec == after.state_spec and unlike[0] != unlike[1]:
            changed = next((x for x, y in zip(*unlike) if x != y), None)
            raise NotTraceableError(
                f"{WHERE}: expected an optimizer whose state changes in tensors alone, got one "
                f'that changes a {type(changed).__name__}; use execute="eager".'
            )
        return Form(
            after.with_tensors([empty] * len(after.tensors())),
            tuple(
                Aux(tuple(_like(x) if isinstance(x, Tensor) else x for x in a.leaves), a.spec)
                for a in aux
            ),
            tuple(g is not None for g in grads),
            distinct_tensors(after.tensors())[1],
            form_key(before) == form_key(after),
        )

    def read(
        self, found: Sequence[Tensor]
    ) -> tuple[Carry, list[Tensor], list[Aux], list[Any], list[Tensor]]:
        """Return carry, losses, aux, gradient and what the adjoint takes from the results."""
        return self.carry_of(found), *self.beside(found)

    def carry_of(self, found: Sequence[Tensor]) -> Carry:
        """Return the carry from the results."""
        return self.carry.with_tensors([found[i] for i in self.where])

    def beside(
        self, found: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Aux], list[Any], list[Tensor]]:
        """Return losses, aux, gradient and what the adjoint takes from the results."""
        begin = self._size
        end = begin + len(self.aux)
        values = list(found[begin:end])
        if self._is_plain:
            return values, list(self.aux), [None] * len(self.grads), list(found[end:])
        remaining = iter(found[end:])
        aux = [
            Aux(tuple(next(remaining) if isinstance(x, Tensor) else x for x in a.leaves), a.spec)
            for a in self.aux
        ]
        grads = [next(remaining) if g else None for g in self.grads]
        return values, aux, grads, list(remaining)

    @functools.cached_property
    def _size(self) -> int:
        return max(self.where) + 1

    @functools.cached_property
    def _is_plain(self) -> bool:
        leaves = [x for a in self.aux for x in a.leaves]
        return not any(self.grads) and not any(isinstance(x, Tensor) for x in leaves)


def form_key(carry: Carry) -> Hashable:
    """Return what another carry must share to run by the same program."""
    leaves = (*carry.params, *carry.state)
    return (
        len(carry.params),
        carry.state_spec,
        tuple(form_of(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves),
        distinct_tensors(carry.tensors())[1],
    )


def distinct_tensors(tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return the tensors, those with integers once each, and where each of them is found there.

    The leaves of a state that step together share their counts.
    """
    out: list[Tensor] = []
    known: dict[int, int] = {}
    where = []
    for x in tensors:
        place = None if x.is_floating_point() or x.is_complex() else known.get(id(x))
        if place is None:
            place = known[id(x)] = len(out)
            out.append(x)
        where.append(place)
    return out, tuple(where)


def _like(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=x.dtype)


def _is_count(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def with_counts(carry: Carry, params: Any) -> Carry:
    """Return a carry with tensors for the integers of the state.

    Those of all parameters in one place of the state are one tensor, as they are after a step.

    Args:
        carry: Parameters and state.
        params: The form of the parameters.
    """
    if not any(map(_is_count, carry.state)):
        return carry
    ends = {tuple(path) for path in params.paths()}
    counts: dict[Hashable, Tensor] = {}
    state = []
    for path, x in zip(carry.state_spec.paths(), carry.state):
        if _is_count(x):
            start = next((path[:k] for k in range(len(path) + 1) if path[k:] in ends), path)
            x = counts.setdefault((start, x), torch.tensor(x))
        state.append(x)
    return replace(carry, state=tuple(state))


def with_ints(carry: Carry, like: Carry) -> Carry:
    """Return a carry with integers where `like` has some."""
    if not any(map(_is_count, like.state)):
        return carry
    state = tuple(int(x) if _is_count(y) else x for x, y in zip(carry.state, like.state))
    return replace(carry, state=state)


class Nothing:
    """The surroundings of a step that sees nothing besides its arguments."""

    def retaken(self) -> Nothing:
        """Return the same."""
        return self

    def replayed(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return contextlib.nullcontext()

    def is_touched(self) -> bool:
        """Return False."""
        return False

    def require_copied(self) -> None:
        """Do nothing: a trace of a loss that changes anything raises."""


def present(values: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the tensors among these."""
    return [x for x in values if x is not None]


def filled(form: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Return a list like `form` with tensors where it has no None."""
    remaining = iter(tensors)
    return [None if x is None else next(remaining) for x in form]


def call_key(call: Call) -> Hashable:
    """Return what all programs of a call depend on, besides the loss and the optimizer."""
    trees = [*call.batches, *call.meta]
    objects = [x for tree in trees for x in tree.leaves if not isinstance(x, (Hole, *ATOMS))]
    return (
        fingerprint(*objects).key,
        settings(),
        call.derivative,
        call.tasks,
        (call.params.spec, call.params.orders),
        len(call.blocks),
        tuple((tree.spec, tree.orders, fixed(tree.leaves)) for tree in call.meta),
    )


def fixed(leaves: Sequence[Any]) -> Hashable:
    """Return the leaves of a template that are no tensors; objects are compared by content."""
    return tuple((type(x), repr(x) if isinstance(x, ATOMS) else None) for x in leaves)


def described(call: Call, compiled: bool) -> str:
    """Return what a program is of, for the log."""
    shapes = [tuple(call.inputs[h.index].shape) for h in call.params.holes()][:3]
    name = getattr(call.loss, "__qualname__", type(call.loss).__name__)
    how = "compiled" if compiled else "not compiled"
    return f'{name} ({how}, "{call.derivative}", parameters {shapes})'
