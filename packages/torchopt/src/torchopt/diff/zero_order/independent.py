# SPDX-License-Identifier: Apache-2.0
"""The interface of sources of directions, and the sources with independent entries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchopt.diff.zero_order.seeds import member_seed, member_seeds

__all__ = [
    "Directions",
    "Gaussian",
    "Rademacher",
    "block_size",
    "is_flat",
    "rows_of_blocks",
    "split",
]


class Directions(ABC):
    """A source of random directions in a space of trees.

    Attributes:
        standard_normal: Whether each direction by itself is standard normal, which second
            derivatives require.

    Example:
        >>> class Ones(Directions):  # a source of your own defines `draw`
        ...     def draw(self, like, seed, start, stop):
        ...         return [x.new_ones(stop - start, *x.shape) for x in like]
        >>> Ones().draw([torch.zeros(2)], seed=0, start=0, stop=1)
        [tensor([[1., 1.]])]
    """

    standard_normal: ClassVar[bool] = False

    def coupled(self, dimension: int) -> int:
        """Return how many consecutive directions form a block.

        Directions within a block depend on one another; blocks are independent.
        """
        del dimension
        return 1

    def drawn_together(self, dimension: int) -> int:
        """Return how many consecutive directions are drawn at once, a multiple of `coupled`.

        A range that begins and ends at multiples of this number draws nothing that it drops.
        """
        return self.coupled(dimension)

    def joins_leaves(self) -> bool:
        """Return whether leaves for which `is_flat` holds are drawn as if they were one vector.

        Then an estimate adds, weighs and sums directions as one matrix.
        """
        return False

    def second_moment(self, tree: Sequence[Tensor]) -> list[Tensor]:
        """Return E[z z'] h for the leaves h of a tree, which is h if the covariance is I.

        Raises:
            ValueError: E[z z'] is not known.
        """
        return list(tree)

    @abstractmethod
    def draw(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1` of the family that `seed` determines.

        Args:
            like: The leaves of a point of the space.
            seed: Determines the family.
            start: First direction, a multiple of `coupled(D)`.
            stop: One past the last direction.

        Returns:
            For each leaf of shape `[*shape]` a new tensor `[stop - start, *shape]` of the same
            dtype, on the same device.
        """


# Directions are drawn in blocks of about this many entries, each from a seed of its own: a call and
# a seed cost 4 % of a block. Directions of moderate size are drawn one by one, with all leaves in
# one call, larger ones leaf by leaf.
_ENTRIES_PER_BLOCK = 2**15
_LARGEST_FLAT = 2**17


def block_size(dimension: int) -> int:
    """Return how many consecutive directions with independent entries share one seed."""
    return max(1, _ENTRIES_PER_BLOCK // max(dimension, 1))


def rows_of_blocks(start: int, stop: int, size: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Return rows `start` to `stop - 1` of the concatenation of blocks of `size` rows."""
    blocks = range(start // size, -(-stop // size))
    first = start - blocks.start * size
    return torch.cat([draw(block) for block in blocks])[first : first + stop - start]


class _Independent(Directions):
    """Directions with independent entries.

    For trees of one dtype and device with at most 2**17 entries, a block of directions is drawn as
    one flat vector. For larger trees, directions are drawn leaf by leaf.
    """

    def drawn_together(self, dimension: int) -> int:
        """Return the number of directions in a block."""
        return block_size(dimension)

    def joins_leaves(self) -> bool:
        """Return whether directions are drawn by this class, not by a `draw` of a subclass."""
        return type(self).draw is _Independent.draw

    def fill(self, out: Tensor, generator: torch.Generator) -> None:
        """Write random entries into the contiguous tensor `out`."""
        raise NotImplementedError

    def leaves(self, like: Sequence[Tensor], seed: int, member: int) -> Iterator[Tensor]:
        """Yield direction `member` leaf by leaf, holding one leaf or 2**17 entries at a time."""
        if is_flat(like):
            yield from (z[0] for z in self.draw(like, seed, member, member + 1))
            return
        generators: dict[torch.device, torch.Generator] = {}
        for leaf in like:
            out = torch.empty_like(leaf, memory_format=torch.contiguous_format)
            if leaf.device not in generators:
                generators[leaf.device] = torch.Generator(leaf.device)
                generators[leaf.device].manual_seed(member_seed(seed, member))
            self.fill(out, generators[leaf.device])
            yield out

    def draw(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1`, as `Directions.draw` says."""
        if is_flat(like):
            return split(self._draw_flat(like, seed, start, stop), like)
        outs = [leaf.new_empty((stop - start, *leaf.shape)) for leaf in like]
        kept = {leaf.device: torch.Generator(leaf.device) for leaf in like}
        for row, member in enumerate(range(start, stop)):
            for generator in kept.values():
                generator.manual_seed(member_seed(seed, member))
            for out in outs:
                self.fill(out[row], kept[out.device])
        return outs

    def _draw_flat(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> Tensor:
        dimension = sum(leaf.numel() for leaf in like)
        size = block_size(dimension)
        generator, seed_of = torch.Generator(like[0].device), member_seeds(seed)
        numbers = range(start // size, -(-stop // size))

        def rows(number: int) -> Tensor:
            """Return those rows of a block that are in the range, in a larger tensor."""
            first, last = max(0, start - number * size), min(size, stop - number * size)
            needed, whole = last * dimension, size * dimension
            block = like[0].new_empty(self._filled(needed, whole) if like[0].is_cpu else whole)
            self.fill(block, generator.manual_seed(seed_of(number)))
            return block[first * dimension : needed].view(last - first, dimension)

        if len(numbers) == 1 and start % size == 0:  # otherwise a copy takes less memory
            return rows(numbers[0])
        out = like[0].new_empty((stop - start, dimension))
        counts = [min(stop, (n + 1) * size) - max(start, n * size) for n in numbers]
        for number, count, part in zip(numbers, counts, out.split(counts)):
            if count == size:
                self.fill(part, generator.manual_seed(seed_of(number)))
            else:
                part.copy_(rows(number))
        return out

    def _filled(self, needed: int, whole: int) -> int:
        """Return how many entries of a block are drawn on a CPU, of which the first are needed.

        There torch draws entries in order, 16 at a time, and the last 16 of all again.
        """
        filled = -(-needed // 16) * 16
        in_order = type(self) in (Gaussian, Rademacher) and filled + 16 <= whole
        return filled if in_order else whole


def is_flat(like: Sequence[Tensor]) -> bool:
    """Return whether leaves have one dtype and device, and few entries together."""
    return (
        sum(leaf.numel() for leaf in like) <= _LARGEST_FLAT
        and len({(leaf.dtype, leaf.device) for leaf in like}) == 1
    )


def split(matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the columns of `[n, D]` as one tensor `[n, *shape]` for each leaf."""
    if len(like) == 1 and like[0].ndim == 1 and matrix.dtype == like[0].dtype:
        return [matrix.to(like[0].device)]
    parts = matrix.split([leaf.numel() for leaf in like], dim=1)
    return [
        part.reshape(len(matrix), *leaf.shape).to(device=leaf.device, dtype=leaf.dtype)
        for part, leaf in zip(parts, like)
    ]


@dataclass(frozen=True)
class Gaussian(_Independent):
    """Standard normal directions: E[z] = 0, E[z z'] = I.

    Example:
        >>> z = Gaussian().draw([torch.zeros(2, 3)], seed=0, start=4, stop=9)[0]
        >>> z.shape
        torch.Size([5, 2, 3])
        >>> torch.equal(z[2:3], Gaussian().draw([torch.zeros(2, 3)], seed=0, start=6, stop=7)[0])
        True
    """

    standard_normal: ClassVar[bool] = True

    def fill(self, out: Tensor, generator: torch.Generator) -> None:
        """Write random entries into the contiguous tensor `out`."""
        out.normal_(generator=generator)


@dataclass(frozen=True)
class Rademacher(_Independent):
    """Directions of independent signs +1 and -1, as in SPSA.

    Among directions with independent entries they give the least variance.

    Example:
        >>> z = Rademacher().draw([torch.zeros(2, 3)], seed=0, start=0, stop=5)[0]
        >>> z.shape, z.unique()
        (torch.Size([5, 2, 3]), tensor([-1.,  1.]))
    """

    def fill(self, out: Tensor, generator: torch.Generator) -> None:
        """Write random entries into the contiguous tensor `out`."""
        out.random_(0, 2, generator=generator).mul_(2).sub_(1)
