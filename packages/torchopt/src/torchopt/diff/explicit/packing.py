# SPDX-License-Identifier: Apache-2.0
"""Small tensors in one buffer: a compiled program has fewer arguments and results then.

To allocate a tensor, and to hand it from Python to C++ and back, takes as long as the loops over
some thousand elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.torch_internals import SMALL_BYTES, flattened, unflattened

__all__ = ["Packing"]


@dataclass(frozen=True)
class Packing:
    """Which tensors of a list share a buffer.

    Attributes:
        size: How many tensors the list has.
        places: Which of them share the buffer.
        shapes: The shapes of those.
        dtype: Their type.
    """

    size: int
    places: tuple[int, ...] = ()
    shapes: tuple[torch.Size, ...] = ()
    dtype: torch.dtype | None = None

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Packing:
        """Return how tensors like these are packed."""
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)
        places = tuple(
            i
            for i, x in enumerate(tensors)
            if x.dtype is dtype
            and x.device.type == "cpu"
            and x.nbytes <= SMALL_BYTES
            and x.is_contiguous()
        )
        if len(places) < 2:
            return Packing(len(tensors))
        return Packing(len(tensors), places, tuple(tensors[i].shape for i in places), dtype)

    @property
    def count(self) -> int:
        """How many tensors there are in a packed list."""
        return self.size - len(self.places) + bool(self.places)

    def packed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the packed list: the buffer, and then the other tensors."""
        if not self.places:
            return list(tensors)
        inside = set(self.places)
        others = [x for i, x in enumerate(tensors) if i not in inside]
        return [flattened([tensors[i] for i in self.places]), *others]

    def unpacked(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the list from a packed one; those of the buffer are parts of it."""
        if not self.places:
            return list(tensors)
        buffer, *others = tensors
        found = dict(zip(self.places, unflattened(buffer, self.shapes)))
        remaining = iter(others)
        return [found[i] if i in found else next(remaining) for i in range(self.size)]
