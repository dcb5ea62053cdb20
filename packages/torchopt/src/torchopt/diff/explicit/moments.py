# SPDX-License-Identifier: Apache-2.0
"""Where a run is, and the places of it that are kept, on the device or on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torchopt.diff.explicit.host import Parked
from torchopt.diff.explicit.step import Carry
from torchopt.diff.surroundings import Surroundings

__all__ = ["Moment", "Moments"]


@dataclass(frozen=True)
class Moment:
    """A moment of a run: the state before a step, and what the loss sees besides its arguments.

    Attributes:
        carry: Parameters and state; None where they follow from an earlier moment and gradients.
        seen: Buffers, modes, counters and random generators.
        grads: The gradient there, where it is kept.
    """

    carry: Any
    seen: Surroundings
    grads: list[Any] | None = None

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
    """The moments that a run keeps, on the device or on the host.

    Args:
        host: Whether they are kept on the host.
        update: Returns the state after a step from that before it and the gradient.
    """

    def __init__(self, *, host: bool, update: Callable[[Carry, list[Any]], Carry]) -> None:
        super().__init__()
        self._host, self._update = host, update

    def keep(self, step: int, moment: Moment) -> None:
        """Keep the moment before a step."""
        self[step] = moment.parked() if self._host else moment

    def at(self, step: int) -> Moment:
        """Return the moment before a step."""
        found: Moment | ParkedMoment = self[step]
        if isinstance(found, ParkedMoment):
            return found.fetched()
        if found.carry is not None:
            return found
        begin = next(t for t in range(step, -1, -1) if self[t].carry is not None)
        carry = self[begin].carry
        for t in range(begin, step):
            carry = self._update(carry, self[t].grads)
        return replace(found, carry=carry)
