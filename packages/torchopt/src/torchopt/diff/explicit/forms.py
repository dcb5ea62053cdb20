# SPDX-License-Identifier: Apache-2.0
"""The arguments and results of the program of a step, as flat lists of tensors."""

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
    "EMPTY",
    "WAY_OUT",
    "WHERE",
    "Form",
    "Nothing",
    "Pull",
    "call_key",
    "described",
    "distinct_tensors",
    "empty_of",
    "filled",
    "fixed",
    "form_key",
    "is_count",
    "present",
    "with_counts",
    "with_ints",
]

WHERE, WAY_OUT = "inner_loop: execute", 'use execute="eager"'
EMPTY = torch.empty(0)  # stands for any tensor in a form


@dataclass(frozen=True)
class Pull:
    """The adjoint of a step, computed from tensors that the program of the step kept.

    Attributes:
        program: Maps the kept tensors and the cotangents of the smooth tensors of the carry after
            the step to the cotangents before it.
        present: Which smooth tensors of the carry before the step have a cotangent.
        places: Positions of the inputs that the remaining cotangents belong to.
    """

    program: Program
    present: list[bool]
    places: list[int]


@dataclass(frozen=True)
class Form:
    """The results of a program of steps: the carry, the losses, their aux and a gradient.

    Attributes:
        carry: The carry, with placeholders for its tensors.
        aux: The aux of the loss in each step, with placeholders for its tensors.
        grads: Which leaves of the parameters have a gradient.
        where: For each tensor of the carry, its position among the results.
        stable: Whether the carry has the same form as before the steps, so that the program can
            run again.
        pull: The adjoint, if the program also returns the tensors that it needs.
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
            after.with_tensors([EMPTY] * len(after.tensors())),
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
        """Split the results into carry, losses, aux, gradient and the tensors for the adjoint."""
        return self.carry_of(found), *self.beside(found, self._size)

    def carry_of(self, found: Sequence[Tensor]) -> Carry:
        """Return the carry among the results."""
        return self.carry.with_tensors([found[i] for i in self.where])

    def beside(
        self, found: Sequence[Tensor], begin: int
    ) -> tuple[list[Tensor], list[Aux], list[Any], list[Tensor]]:
        """Return losses, aux, gradient and the tensors for the adjoint among the results.

        Args:
            found: The results.
            begin: The number of results of the carry.
        """
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
    """Return the key that two carries must share to use the same program."""
    leaves = (*carry.params, *carry.state)
    return (
        len(carry.params),
        carry.state_spec,
        tuple(form_of(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves),
        distinct_tensors(carry.tensors())[1],
    )


def distinct_tensors(tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return the tensors without repeated integer tensors, and the position of each in that list.

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


def is_count(x: Any) -> bool:
    """Return whether a leaf of a state is a Python integer."""
    return isinstance(x, int) and not isinstance(x, bool)


def with_counts(carry: Carry, params: Any) -> Carry:
    """Return a carry whose integers in the state are replaced by tensors.

    Equal counts of all parameters in one place of the state become one tensor, as after a step.

    Args:
        carry: Parameters and state.
        params: The structure of the parameters.
    """
    if not any(map(is_count, carry.state)):
        return carry
    ends = {tuple(path) for path in params.paths()}
    counts: dict[Hashable, Tensor] = {}
    state = []
    for path, x in zip(carry.state_spec.paths(), carry.state):
        if is_count(x):
            start = next((path[:k] for k in range(len(path) + 1) if path[k:] in ends), path)
            x = counts.setdefault((start, x), torch.tensor(x))
        state.append(x)
    return replace(carry, state=tuple(state))


def with_ints(carry: Carry, like: Carry) -> Carry:
    """Return a carry whose tensors are replaced by integers where `like` has integers."""
    if not any(map(is_count, like.state)):
        return carry
    state = tuple(int(x) if is_count(y) else x for x, y in zip(carry.state, like.state))
    return replace(carry, state=state)


@functools.cache
def empty_of(dtype: torch.dtype) -> Tensor:
    """Return an empty tensor, which stands for any tensor of this dtype."""
    return torch.empty(0, dtype=dtype)


class Nothing:
    """The surroundings of a step that depends only on its arguments."""

    def retaken(self) -> Nothing:
        """Return this object."""
        return self

    def replayed(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return contextlib.nullcontext()

    def is_touched(self) -> bool:
        """Return False."""
        return False

    def require_copied(self) -> None:
        """Do nothing: the trace of a loss that changes anything raises."""


def present(values: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the values that are not None."""
    return [x for x in values if x is not None]


def filled(form: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """Return a list like `form` with its values, except None, replaced by tensors."""
    remaining = iter(tensors)
    return [None if x is None else next(remaining) for x in form]


def call_key(call: Call) -> Hashable:
    """Return the key of everything that the programs of a call share besides loss and optimizer."""
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
    """Return a key of the leaves of a template that are not tensors."""
    return tuple((type(x), repr(x) if isinstance(x, ATOMS) else None) for x in leaves)


def described(call: Call, compiled: bool) -> str:
    """Describe a program for the log."""
    shapes = [tuple(call.inputs[h.index].shape) for h in call.params.holes()][:3]
    name = getattr(call.loss, "__qualname__", type(call.loss).__name__)
    how = "compiled" if compiled else "not compiled"
    return f'{name} ({how}, "{call.derivative}", parameters {shapes})'
