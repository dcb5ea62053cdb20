# SPDX-License-Identifier: Apache-2.0
"""Small tensors in one buffer, so that a compiled program has fewer arguments and results.

Allocating a tensor and passing it from Python to C++ and back takes as long as loops over a few
thousand elements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.torch_internals import flattened, is_packable, unflattened

__all__ = ["Packing"]

ANY = torch.zeros(())  # expanded where a tensor of some shape is needed


@dataclass(frozen=True)
class Packing:
    """The layout of a list in which some tensors share a buffer.

    Attributes:
        size: The number of tensors in the list.
        places: The positions of those that share the buffer.
        shapes: Their shapes.
        dtype: Their dtype.
    """

    size: int
    places: tuple[int, ...] = ()
    shapes: tuple[torch.Size, ...] = ()
    dtype: torch.dtype | None = None

    @staticmethod
    def of(tensors: Sequence[Tensor]) -> Packing:
        """Return the packing of tensors like these."""
        dtype = next((x.dtype for x in tensors if x.is_floating_point()), None)
        places = tuple(i for i, x in enumerate(tensors) if x.dtype is dtype and is_packable(x))
        if len(places) < 2:
            return Packing(len(tensors))
        return Packing(len(tensors), places, tuple(tensors[i].shape for i in places), dtype)

    @functools.cached_property
    def _like(self) -> list[Tensor]:
        return [ANY.expand(shape) for shape in self.shapes]

    @functools.cached_property
    def _others(self) -> list[int]:
        return [i for i in range(self.size) if i not in self.places]

    @property
    def is_whole(self) -> bool:
        """Whether a packed list is one buffer, whose form depends on nothing else."""
        return len(self.places) == self.size

    @property
    def count(self) -> int:
        """The number of tensors in a packed list."""
        return self.size - len(self.places) + bool(self.places)

    def packed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the packed list: the buffer, followed by the other tensors."""
        if not self.places:
            return list(tensors)
        if not self._others:
            return [flattened(tensors)]
        inside = [tensors[i] for i in self.places]
        return [flattened(inside), *(tensors[i] for i in self._others)]

    def unpacked(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the original list from a packed one, with views of the buffer."""
        if not self.places:
            return list(tensors)
        parts = unflattened(tensors[0], self._like)
        if not self._others:
            return list(parts)
        found = dict(zip((*self.places, *self._others), (*parts, *tensors[1:])))
        return [found[i] for i in range(self.size)]
