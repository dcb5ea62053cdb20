# SPDX-License-Identifier: Apache-2.0
"""Keep states in pinned memory of the host while the run continues on a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Parked", "is_away"]


def is_away(x: Tensor) -> bool:
    """Return whether a tensor is in the memory of a device and can be parked on the host."""
    return x.device.type not in ("cpu", "meta")


@dataclass(frozen=True)
class Parked:
    """Leaves whose device tensors are parked on the host; all other leaves stay as they are.

    Both copies are enqueued on the current stream, and the host does not wait for the device. A
    leaf that occurs in several places is copied once.
    """

    leaves: tuple[Any, ...]
    devices: tuple[torch.device | None, ...]  # the device of a leaf; None: it was not moved

    @staticmethod
    def of(leaves: Sequence[Any]) -> Parked:
        """Park leaves."""
        away = [isinstance(x, Tensor) and is_away(x) for x in leaves]
        return Parked(
            tuple(_once(_to_host, leaves, away)),
            tuple(x.device if a else None for x, a in zip(leaves, away)),
        )

    def fetched(self) -> list[Any]:
        """Return the leaves on their own devices."""
        device = {id(x): d for x, d in zip(self.leaves, self.devices)}

        def back(x: Tensor) -> Tensor:
            return x.to(device[id(x)], non_blocking=True)

        return _once(back, self.leaves, [d is not None for d in self.devices])


def _to_host(x: Tensor) -> Tensor:
    # With pinned memory the device copies by itself, and the host continues in the meantime.
    pinned = torch.empty_like(x, device="cpu", pin_memory=torch.cuda.is_available())
    return pinned.copy_(x, non_blocking=True)


def _once(
    function: Callable[[Tensor], Tensor], leaves: Sequence[Any], where: Sequence[bool]
) -> list[Any]:
    made: dict[int, Tensor] = {}
    for x, chosen in zip(leaves, where):
        if chosen and id(x) not in made:
            made[id(x)] = function(x)
    return [made[id(x)] if chosen else x for x, chosen in zip(leaves, where)]
