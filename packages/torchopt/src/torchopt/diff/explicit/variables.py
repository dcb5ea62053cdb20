# SPDX-License-Identifier: Apache-2.0
"""The tensors that steps are differentiated with respect to, as leaves of graphs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.step import Carry
from torchopt.diff.places import what_varies
from torchopt.tree import is_smooth

__all__ = ["AtStep", "Input", "Leaves", "Variables"]


@dataclass(frozen=True)
class Leaves:
    """The inputs of a call as leaves of graphs, made once for all steps of a sweep.

    Attributes:
        call: The call.
        given: The inputs.
    """

    call: Call
    given: Sequence[Tensor]

    @functools.cached_property
    def constants(self) -> list[Tensor]:
        """The inputs, outside any graph."""
        return [x.detach() for x in self.given]

    @functools.cached_property
    def tensors(self) -> list[Tensor]:
        """The same; those that are differentiated, and are not given by step, are leaves."""
        leaves = [x.detach() for x in self.given]
        for i in self.call.wanted:
            if not self.call.by_step(i):
                leaves[i] = leaves[i].requires_grad_()
        return leaves

    @functools.cached_property
    def optimizer(self) -> GradientTransformation:
        """The optimizer with these tensors."""
        return self.call.optimizer_with(self.tensors)

    def optimizer_now(self) -> GradientTransformation:
        """Return the optimizer with these tensors and the current values of everything else."""
        return self.call.optimizer_with(self.tensors) if self._varies else self.optimizer

    @functools.cached_property
    def _varies(self) -> bool:
        return bool(self.call.hypers and what_varies(self.call.optimizer))


# An input: its index, and the step if a slice for one step is meant, None for the whole tensor.
Input = tuple[int, int | None]


@dataclass
class Variables:
    """The tensors that steps are differentiated with respect to, each a leaf of a graph.

    Attributes:
        carry: Parameters and state.
        tensors: The inputs of the call as the steps use them.
        used: The inputs that are differentiated.
        leaves: The leaves for the carry, then those for the inputs.
        size: The number of leaves for the carry.
    """

    carry: Carry
    tensors: list[Any]
    used: list[Input]
    leaves: list[Tensor]
    size: int

    @staticmethod
    def of(call: Call, carry: Carry, inputs: Leaves, steps: range) -> Variables:
        """Return leaves for the tensors of some steps."""
        smooth = [x.detach().requires_grad_() for x in carry.smooth]
        wanted = set(call.wanted)
        used: dict[Input, None] = {(i, None): None for i in call.hypers if i in wanted}
        tensors: list[Any] = list(inputs.tensors)
        for step in steps:
            for h in call.used_at(step):
                if h.index not in wanted:
                    continue
                if h.by_step:
                    tensors[h.index] = given = AtStep.of(tensors[h.index])
                    given.slices[step] = inputs.constants[h.index][step].detach().requires_grad_()
                used[h.index, step if h.by_step else None] = None
        found = [tensors[i] if t is None else tensors[i][t] for i, t in used]
        leaves = [*smooth, *found]
        return Variables(carry.with_smooth(smooth), tensors, list(used), leaves, len(smooth))

    def drop_state(self) -> list[int]:
        """Forget the state, which the loss does not use; return the indices of the other leaves."""
        count = sum(map(is_smooth, self.carry.params))
        left = [*range(count), *range(self.size, len(self.leaves))]
        self.carry = replace(self.carry, state=())
        self.leaves = [self.leaves[i] for i in left]
        return left

    def parted(self, found: list[Tensor | None]) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
        """Split the cotangents of the leaves into those of the carry and those of the inputs."""
        by_input = {i: c for i, c in zip(self.used, found[self.size :]) if c is not None}
        return found[: self.size], by_input


@dataclass(frozen=True)
class AtStep:
    """Stands in for a tensor with a slice for each step, and holds the slices of some steps."""

    slices: dict[int, Tensor]

    @staticmethod
    def of(x: Any) -> AtStep:
        """Return x if it is a stand-in, else a new stand-in."""
        return x if isinstance(x, AtStep) else AtStep({})

    def __getitem__(self, step: int) -> Tensor:
        return self.slices[step]

    def detach(self) -> AtStep:
        """Return the same outside any graph."""
        return AtStep({t: x.detach() for t, x in self.slices.items()})
