# SPDX-License-Identifier: Apache-2.0
"""Leaves as an estimate holds them: joined into one vector, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import Directions
from torchopt.diff.zero_order.estimators import Estimator, identity
from torchopt.diff.zero_order.independent import is_flat
from torchopt.torch_internals import flattened, foreach_add

__all__ = ["Form"]


class Form:
    """How the leaves of a point are held while directions are drawn, added and summed.

    Small leaves are one vector, and their directions one matrix. So a step that would take one
    operation for each leaf takes one.

    Args:
        leaves: The leaves of the point.
        directions: The source of the directions.
        estimator: The estimator.

    Attributes:
        joined: Whether the leaves are one vector.

    Example:
        >>> from torchopt.diff.zero_order.directions import Gaussian
        >>> from torchopt.diff.zero_order.estimators import naive
        >>> leaves = [torch.ones(2), torch.zeros(1, 1)]
        >>> form = Form(leaves, Gaussian(), naive)
        >>> form.held(leaves)
        [tensor([1., 1., 0.])]
        >>> [x.shape for x in form.leaves([torch.zeros(5, 3)])]
        [torch.Size([5, 2]), torch.Size([5, 1, 1])]
    """

    def __init__(
        self, leaves: Sequence[Tensor], directions: Directions, estimator: Estimator
    ) -> None:
        self.joined = (
            len(leaves) > 1
            and directions.joins_leaves()
            # Entrywise functions; any other may need the shapes of the leaves.
            and (estimator.dual is identity or estimator.dual is torch.reciprocal)
            and is_flat(leaves)
        )
        # Tuples, since a view of a `torch.Size` takes twice as long.
        self._shapes = [tuple(x.shape) for x in leaves]
        self._sizes = [x.numel() for x in leaves]

    def held(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return leaves in this form."""
        return [flattened(leaves)] if self.joined else list(leaves)

    def leaves(self, held: Sequence[Tensor]) -> list[Tensor]:
        """Return views of the leaves, or of rows of them, from what holds them."""
        if not self.joined:
            return list(held)
        (vector,) = held
        return self._shaped(vector.split_with_sizes(self._sizes, -1))

    def _shaped(self, parts: Sequence[Tensor]) -> list[Tensor]:
        lead, shapes = tuple(parts[0].shape[:-1]), self._shapes
        return [x if len(s) == 1 else x.view(lead + s) for x, s in zip(parts, shapes)]

    def copies(self, held: Sequence[Tensor]) -> list[Tensor]:
        """Return leaves, each with memory of its own, so that keeping one does not keep all."""
        return [x.clone() for x in self.leaves(held)] if self.joined else list(held)

    def perturbed(
        self, held: Sequence[Tensor], noise: Sequence[Tensor], steps: Sequence[float]
    ) -> Callable[[int, int, range], list[Tensor]]:
        """Return a function that makes new points theta + step z, for a range of directions z.

        It takes the range and the numbers of the steps. Each leaf of the points is contiguous: a
        batch of products of small matrices then takes 10 % less time than with rows of a matrix.
        """

        def make(start: int, stop: int, places: range) -> list[Tensor]:
            rows = [z[start:stop] for z in noise]
            if len(places) == 1:
                step = steps[places[0]]
                return list(foreach_add(self.leaves(held), self.leaves(rows), alpha=step))
            points = [
                torch.cat([torch.add(x, z, alpha=steps[k]) for k in places])
                for x, z in zip(held, rows)
            ]
            if not self.joined:
                return points
            # Memory of their own: a function may overwrite one leaf while a graph needs another.
            split: Callable[..., Any] = torch.split_with_sizes_copy  # its stub returns None
            return self._shaped(split(points[0], self._sizes, -1))

        return make
