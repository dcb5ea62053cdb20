# SPDX-License-Identifier: Apache-2.0
"""The unrolled loop, which keeps everything: differentiable to any order, in every transform.

It is the reference for all other ways of running a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.moments import Trail
from torchopt.diff.explicit.step import Aux, Carry, attached_gradient, start, update
from torchopt.tree import tree_unflatten

__all__ = ["Outputs", "run_attached"]


@dataclass(frozen=True)
class Outputs:
    """The end of a run.

    Attributes:
        carry: Parameters and state after the last step.
        losses: `[steps]` or `[tasks, steps]`.
        aux: The leaves of the aux of all steps, each stacked like `losses`; leaves that are not
            tensors of one shape are collected in a tuple.
    """

    carry: Carry
    losses: Tensor
    aux: Aux

    @staticmethod
    def of(call: Call, carry: Carry, losses: Sequence[Tensor], aux: Sequence[Aux]) -> Outputs:
        """Return the outputs of a run, given those of its steps."""
        dim = 0 if call.tasks is None else 1
        specs = {id(a.spec): a.spec for a in aux}
        if len(specs) > 1 and len(set(specs.values())) > 1:
            raise ValueError(
                "inner_loop: loss: expected the same structure of what it returns besides the loss "
                f"in each step, got {len(set(specs.values()))} different ones."
            )
        stacked = tuple(_stacked(column, dim) for column in zip(*(a.leaves for a in aux)))
        return Outputs(carry, torch.stack(list(losses), dim), Aux(stacked, aux[0].spec))

    def detached(self) -> Outputs:
        """Return the outputs outside any graph."""

        def constant(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(constant, x))
            return x.detach() if isinstance(x, Tensor) else x

        aux = Aux(constant(self.aux.leaves), self.aux.spec)
        return Outputs(self.carry.detached(), self.losses.detach(), aux)

    def aux_tree(self) -> Any:
        """Return the aux of all steps as a tree."""
        return tree_unflatten(self.aux.spec, self.aux.leaves)


def _stacked(column: Sequence[Any], dim: int) -> Any:
    tensors = all(isinstance(x, Tensor) for x in column)
    if tensors and len({x.shape for x in column}) == 1:
        return torch.stack(list(column), dim)
    return None if all(x is None for x in column) else tuple(column)


def run_attached(call: Call, tensors: Sequence[Any], trail: list[Any] | None = None) -> Outputs:
    """Return the outputs of a run on these inputs, with the graph of all differentiated steps.

    Args:
        call: The call.
        tensors: The inputs.
        trail: Gets the record of the run; None: it is not recorded.
    """
    record = None if trail is None else Trail(call, tensors)
    optimizer = call.optimizer_with(tensors)
    carry = start(call, optimizer, tensors)
    if record is not None:
        record.begin()
    losses, aux = [], []
    constants = [x.detach() for x in tensors] if call.first else []
    for t in range(call.steps):
        if t == call.first > 0:
            carry = carry.detached()
        if t < call.first:
            carry = carry.detached()
        grads, value, extra = attached_gradient(
            call, carry.params, constants if t < call.first else tensors, t
        )
        if t < call.first:
            value = value.detach()
            grads = [None if g is None else g.detach() for g in grads]
            extra = Aux(
                tuple(x.detach() if isinstance(x, Tensor) else x for x in extra.leaves), extra.spec
            )
        if record is not None:
            record.keep(carry, grads)
        carry = update(call, optimizer, grads, carry)
        if record is not None:
            record.settle()
        losses.append(value)
        aux.append(extra)
    found = Outputs.of(call, carry, losses, aux)
    if record is not None and trail is not None:
        record.outputs = found.detached()
        trail[:] = [record]
    return found
