# SPDX-License-Identifier: Apache-2.0
"""The last steps of a run whose graph is kept, because it is small."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchopt.diff.explicit.adjoint import Cotangents, attached_step, pulled
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.step import Aux, Carry, require_curvature, require_no_closure
from torchopt.diff.explicit.variables import Input, Leaves, Variables
from torchopt.tree import is_smooth

__all__ = ["Tail"]


class Tail:
    """The steps from `first` to the last one with their graph, for one backward pass.

    Args:
        call: The call, whose derivative is "reverse".
        carry: The state before the first of these steps.
        tensors: The inputs.
        first: The first of these steps.
    """

    def __init__(self, call: Call, carry: Carry, tensors: Sequence[Tensor], first: int) -> None:
        self._call, self.first = call, first
        self._inputs = Leaves(call, tensors)
        self._variables = Variables.of(call, carry, self._inputs, range(first, call.steps))
        self._carry = self._variables.carry
        self._losses: list[Tensor] = []

    def step(self, step: int) -> tuple[Carry, Tensor, Aux]:
        """Return the results of a step outside the graph."""
        variables, before = self._variables, self._carry
        with torch.enable_grad():
            self._carry, _, value, aux = attached_step(
                self._call, self._inputs.optimizer, variables.tensors, before, step
            )
            at = [x for x in before.params if is_smooth(x)]
            require_curvature(self._call, value, at, variables.tensors)
        self._losses += [value, *aux.smooth]
        leaves = tuple(x.detach() if isinstance(x, Tensor) else x for x in aux.leaves)
        return self._carry.detached(), value.detach(), Aux(leaves, aux.spec)

    def require_no_closure(self) -> None:
        """Raise if a loss depends on a tensor that requires a gradient and is not an argument."""
        variables = self._variables
        if self._losses:
            with torch.enable_grad():
                total = torch.stack([x.sum() for x in self._losses if x.requires_grad]).sum()
            require_no_closure(self._call, total, variables.leaves, variables.leaves)

    def pull_back(self, cotangents: Cotangents) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
        """Return the same as `pull_back_steps`, and free the graph."""
        given = [c for row in cotangents.losses for c in row]
        out = pulled(
            [*self._losses, *self._carry.smooth],
            [*given, *cotangents.carry],
            self._variables.leaves,
        )
        return self._variables.parted(out)
