# SPDX-License-Identifier: Apache-2.0
"""Evaluate a function at many points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.zero_order.seeds import common_draws
from torchopt.errors import warn_caller
from torchopt.torch_internals import vmap_lists

__all__ = ["Evaluator", "Points"]

# A vmap takes points of about this many entries together, but not fewer than so many points: its
# intermediate results then stay in the caches of the processor, and a call of it costs little.
# So few points at several places are taken together too, which saves calls.
ENTRIES, LEAST_ROWS = 2**19, 32


@dataclass(frozen=True)
class Points:
    """Points in rows, such as the two of a pair. They are made in groups, when they are evaluated.

    A group has the points at one place of some rows, or all of few points, place by place.

    Attributes:
        count: The number of rows.
        each: The number of points in a row.
        entries: The number of entries of a point.
        make: Maps a range of n rows and a range of m places in them to one tensor `[m n, *shape]`
            for each leaf, place by place.
        like: Tensors on the devices of the points.
        most: The largest number of points in a group, if the memory of a function limits it.
    """

    count: int
    each: int
    entries: int
    make: Callable[[int, int, range], Sequence[Tensor]]
    like: Sequence[Tensor]
    most: int | None = None

    @staticmethod
    def stored(tensors: Sequence[Tensor]) -> Points:
        """Return points that are in memory, one tensor `[n, *shape]` for each leaf."""
        entries = sum(x[0].numel() for x in tensors)

        def make(start: int, stop: int, places: range) -> list[Tensor]:
            return [x[start:stop] for x in tensors]

        return Points(len(tensors[0]), 1, entries, make, tensors)

    def part(self, start: int, stop: int) -> Points:
        """Return rows `start` to `stop - 1`."""

        def make(i: int, j: int, places: range) -> Sequence[Tensor]:
            return self.make(start + i, start + j, places)

        return replace(self, count=stop - start, make=make)

    def groups(self, extra: int) -> Iterator[Sequence[Tensor]]:
        """Yield groups of about equally many points, with `extra` entries besides each point.

        The groups of the places of some rows follow one another.
        """
        within = ENTRIES // max(1, self.entries + extra)
        most = max(LEAST_ROWS, within)
        if self.most is not None:
            most = min(most, self.most)
        if self.count * self.each <= min(most, LEAST_ROWS, within):
            yield self.make(0, self.count, range(self.each))
            return
        rows = -(-self.count // -(-self.count // max(1, most)))
        for start in range(0, self.count, rows):
            for place in range(self.each):
                yield self.make(start, min(start + rows, self.count), range(place, place + 1))

    def in_rows(self, values: Sequence[Tensor]) -> Tensor:
        """Return the values at the points of all groups, `[n, *shape]`, row by row."""
        each = self.each
        if len(values) == 1:
            places = values[0].view(each, self.count, *values[0].shape[1:])
        elif each == 1:
            return torch.cat(list(values))
        else:
            places = torch.stack([torch.cat(list(values[k::each])) for k in range(each)])
        return places.transpose(0, 1).flatten(0, 1)


@dataclass
class Evaluator:
    """Calls a function at many points, by `torch.func.vmap` or in a loop.

    Random draws inside the function (dropout) start from the same seed in every evaluation, so the
    losses differ only by the perturbation.

    Attributes:
        vectorized: True: by vmap, whose errors are raised. False: in a loop. None: by vmap; if the
            function runs in a loop but not under vmap, warn once and use the loop.
    """

    vectorized: bool | None = None

    def __call__(
        self,
        fn: Callable[..., Tensor],
        points: Points,
        scratch: Sequence[Tensor],
        seed: int,
        *,
        outside: bool = True,
    ) -> Tensor:
        """Return `fn(*leaves, *scratch)` at each point, stacked.

        Args:
            fn: Returns a tensor of the same shape at every point, and may overwrite the point.
            points: The points.
            scratch: Tensors that `fn` may overwrite; each evaluation gets copies.
            seed: The seed of random draws inside `fn`.
            outside: Whether `fn` may draw from the generators of Python or numpy.

        Returns:
            `[n, *shape of the output]`.
        """
        if self.vectorized is False:
            return _in_a_loop(fn, points, scratch, seed, outside)
        try:
            return _by_vmap(fn, points, scratch, seed, outside)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if self.vectorized or isinstance(error, torch.OutOfMemoryError):
                raise
            # Raises the error of the function itself.
            losses = _in_a_loop(fn, points, scratch, seed, outside)
            first = str(error).strip().partition("\n")[0]
            warn_caller(
                "zero-order estimation: torch.func.vmap cannot take this function, so it is "
                f"evaluated in a loop, one sample after the other. vmap says: {first} "
                "Pass vectorized=False to accept the loop, vectorized=True to get the full error."
            )
            self.vectorized = False
            return losses


def _by_vmap(
    fn: Callable[..., Tensor], points: Points, scratch: Sequence[Tensor], seed: int, outside: bool
) -> Tensor:
    def called(tensors: list[Tensor]) -> tuple[Any, ...]:
        return (fn(*tensors),)

    losses: list[Tensor] = []
    with common_draws(seed, points.like, outside=outside) as seed_all:
        for tensors in points.groups(sum(x.numel() for x in scratch)):
            if losses:
                seed_all(seed)
            copies = [x.expand(len(tensors[0]), *x.shape).clone() for x in scratch]
            given = [*tensors, *copies]
            losses += vmap_lists(called, given, (0,) * len(given), "same")
    return points.in_rows(losses)


def _in_a_loop(
    fn: Callable[..., Tensor], points: Points, scratch: Sequence[Tensor], seed: int, outside: bool
) -> Tensor:
    losses = []
    with common_draws(seed, points.like, outside=outside) as seed_all:
        for tensors in points.groups(sum(x.numel() for x in scratch)):
            found = []
            for row in zip(*tensors):
                seed_all(seed)
                found.append(fn(*row, *(x.clone() for x in scratch)))
            losses.append(torch.stack(found))
    return points.in_rows(losses)
