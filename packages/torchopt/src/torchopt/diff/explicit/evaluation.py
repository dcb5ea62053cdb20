# SPDX-License-Identifier: Apache-2.0
"""One call of a compiled function whose program computes its value and its derivative."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.trace import Program, Words, versions
from torchopt.errors import NotTraceableError
from torchopt.torch_internals import foreach_mul
from torchopt.tree import tree_unflatten
from torchopt.tree_function import apply_sweep, is_transforming

__all__ = ["Evaluation", "Form", "Prepared"]


@dataclass(frozen=True)
class Form:
    """The form of the results of a program.

    Attributes:
        spec: The tree that the function returns.
        leaves: Its leaves, with None for tensors.
        graph: Which of its tensors are differentiated.
        grads: Which inputs have a gradient.
        inside: Whether the function takes derivatives in tensors that it holds.
        pull: Maps saved tensors and cotangents to gradients; None if the program returns these.
    """

    spec: Any
    leaves: tuple[Any, ...]
    graph: tuple[bool, ...]
    grads: tuple[bool, ...]
    inside: bool
    pull: Program | None


class Evaluation:
    """One call, in the form of `torchopt.tree_function.Sweep`.

    Args:
        program: Returns the tensors of the value, then the gradients or the tensors for them.
        arguments: The arguments of the program.
        held: All tensors that the function reaches.
        words: Words for messages.
    """

    def __init__(
        self, program: Program, arguments: list[Tensor], held: Sequence[Tensor], words: Words
    ) -> None:
        self._program, self._arguments, self._held = program, arguments, held
        self._words = words
        self._form: Form = program.form
        self._kept: list[Any] = []
        self._versions: list[int] = []
        self.values: list[Tensor] = []

    def evaluate(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors that are differentiated."""
        arguments, self._arguments = self._arguments, []  # it is called once
        with torch.no_grad():
            found = self._program(arguments, self._held)
        graph = self._form.graph
        self._kept = list(found[len(graph) :])
        # The program returns an argument as it is where the function returned it detached.
        self.values = [x if g else x.detach() for x, g in zip(found, graph)]
        self._versions = versions(self._kept)
        # Detached, because the graph of the outputs refers to this object.
        return tuple(x.detach() for x, g in zip(self.values, graph) if g)

    def pull_back(
        self, inputs: tuple[Tensor, ...], cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient times the cotangents."""
        if torch.is_grad_enabled() or is_transforming():
            raise NotTraceableError(
                f"{self._words.where}: expected a gradient that is not differentiated again "
                f"(create_graph=False) nor batched, got one that is; {self._words.way_out}."
            )
        if versions(self._kept) != self._versions:
            raise RuntimeError(
                f"{self._words.where}: expected results that are not changed before their "
                "backward pass, got one that was changed in place; clone it first."
            )
        pull = self._form.pull
        if pull is None:
            (c,) = cotangents
            grads = [] if c is None else foreach_mul(self._kept, c)
        else:
            outputs = [x for x, g in zip(self.values, self._form.graph) if g]
            given = [torch.zeros_like(y) if c is None else c for y, c in zip(outputs, cotangents)]
            grads = list(pull([*self._kept, *given], ()))
        found = iter(grads)
        return tuple(next(found, None) if has else None for has in self._form.grads)

    def result(self, outputs: Sequence[Tensor]) -> Any:
        """Return the result of the function, with `outputs` as its differentiated tensors."""
        given, plain = iter(outputs), zip(self.values, self._form.graph)
        tensors = iter([next(given) if g else x for x, g in plain])
        leaves = [next(tensors) if x is None else x[0] for x in self._form.leaves]
        return tree_unflatten(self._form.spec, leaves)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What all calls of one form share.

    Attributes:
        program: The program.
        held: All tensors that the function reaches.
        wanted: Which arguments of the program are differentiated.
        words: Words for messages.
    """

    program: Program
    held: tuple[Tensor, ...]
    wanted: list[bool]
    words: Words

    @functools.cached_property
    def leaves(self) -> list[Tensor]:
        """The tensors that the function reaches and that are differentiated."""
        return [x for x in self.held if x.requires_grad]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Return the result of the function for these arguments of the program."""
        call = Evaluation(self.program, list(tensors), self.held, self.words)
        if not any(self.program.form.graph):
            return call.result(call.evaluate())
        inputs = [*(x for x, w in zip(tensors, self.wanted) if w), *self.leaves]
        with torch.enable_grad():  # the function itself may enable it
            return call.result(apply_sweep(call, *inputs))
