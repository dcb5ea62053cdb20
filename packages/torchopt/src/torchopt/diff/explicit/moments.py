# SPDX-License-Identifier: Apache-2.0
"""Moments of a run that are kept for the backward pass, on the device or on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.host import Parked
from torchopt.diff.explicit.step import Carry, start, update
from torchopt.diff.surroundings import Surroundings
from torchopt.torch_internals import graph_is_kept

__all__ = ["Moment", "Moments", "Trail", "constant", "updated"]


@dataclass
class Moment:
    """A moment of a run: the state before a step, and what the loss reads besides its arguments.

    Attributes:
        carry: Parameters and state; None if they follow from an earlier moment and its gradients,
            or from the inputs of the run.
        seen: Buffers, training flags, counters and random generators.
        grads: The gradient of the step, if it is kept.
    """

    carry: Any
    seen: Surroundings
    grads: list[Any] | None = None

    def taken(self) -> tuple[Carry, list[Any] | None]:
        """Return carry and gradient; they are no longer held here, so that both may be freed."""
        found = self.carry, self.grads
        self.carry = self.grads = None
        return found

    def parked(self) -> ParkedMoment:
        """Return the moment with its tensors on the host."""
        grads = () if self.grads is None else self.grads
        leaves = (*self.carry.params, *self.carry.state, *grads)
        return ParkedMoment(self, Parked.of(leaves))


class ParkedMoment:
    """A moment whose tensors are on the host."""

    def __init__(self, moment: Moment, parked: Parked) -> None:
        self._sizes = len(moment.carry.params), len(moment.carry.state)
        self._spec, self._seen = moment.carry.state_spec, moment.seen
        self._has_grads, self._parked = moment.grads is not None, parked

    def fetched(self) -> Moment:
        """Return the moment with its tensors on their own devices."""
        leaves, (n, m) = self._parked.fetched(), self._sizes
        carry = Carry(tuple(leaves[:n]), tuple(leaves[n : n + m]), self._spec)
        return Moment(carry, self._seen, leaves[n + m :] if self._has_grads else None)


class Moments(dict[int, Any]):
    """The moments that a run of a call keeps, on the device or on the host."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._call = call

    def keep(self, step: int, moment: Moment) -> None:
        """Keep the moment before a step."""
        self[step] = moment.parked() if self._call.host else moment

    def at(self, step: int) -> Moment:
        """Return the moment before a step, and keep a copy of it."""
        found = self[step]
        if not isinstance(found, Moment):
            later: Moment = found.fetched()
            return later
        if found.carry is not None:
            return replace(found)
        begin = next((t for t in range(step, -1, -1) if self[t].carry is not None), 0)
        carry = self[begin].carry or self._started()
        for t in range(begin, step):
            with self[t].seen.replayed_beside():
                carry = updated(self._call, carry, self[t].grads)
        return replace(found, carry=carry)

    def last(self, step: int) -> Moment:
        """Return the moment before a step.

        If no other backward pass needs it, it is dropped, and so are later ones.
        """
        found = self.at(step)
        if not graph_is_kept():
            for t in [t for t in self if t >= step]:
                del self[t]
        return found

    def _started(self) -> Carry:
        call = self._call
        with torch.no_grad():
            return start(call, call.optimizer, [x.detach() for x in call.inputs]).detached()


class Trail:
    """A run that is recorded, so that another derivative of it need not run it again.

    Args:
        call: The call.
        tensors: Its inputs.

    Attributes:
        moments: The one before each step.
        seen: The surroundings at the start.
        outputs: What the run returned, outside any graph; None until it has ended.
    """

    def __init__(self, call: Call, tensors: Sequence[Any]) -> None:
        self.moments: list[Moment] = []
        self.outputs: Any = None
        constants = [x.detach() for x in tensors]
        self.seen = Surroundings(call.loss, constants, beside=call.optimizer).retaken()
        self._now = self.seen

    def begin(self) -> None:
        """Look at the surroundings after the start, which may draw random numbers."""
        self._now = self._now.retaken()

    def keep(self, carry: Carry, grads: Sequence[Any]) -> None:
        """Record the state before a step, and its gradient."""
        constants = [None if g is None else g.detach() for g in grads]
        self.moments.append(Moment(carry.detached(), self._now, constants))
        self._drawn = self._now.generators()

    def settle(self) -> None:
        """Look at the surroundings after an update."""
        if not all(map(torch.equal, self._drawn, self._now.generators())):
            # The adjoint of the update must draw the same numbers, after the loss.
            self.moments[-1].grads = None
        self._now = self._now.retaken()


def updated(call: Call, carry: Carry, grads: Sequence[Any]) -> Carry:
    """Return the state after a step, given the gradient, outside any graph."""
    with torch.no_grad():
        return constant(update(call, call.optimizer, grads, carry))


def constant(carry: Carry) -> Carry:
    """Return the carry without a graph; the state may contain a tensor that requires a gradient."""
    leaves = (*carry.params, *carry.state)
    attached = any(isinstance(x, Tensor) and x.requires_grad for x in leaves)
    return carry.detached() if attached else carry
