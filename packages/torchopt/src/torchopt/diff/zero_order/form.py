# SPDX-License-Identifier: Apache-2.0
"""Leaves as an estimate holds them: joined into one vector, or one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import Directions
from torchopt.diff.zero_order.estimators import Estimator, identity
from torchopt.diff.zero_order.independent import is_flat
from torchopt.torch_internals import foreach_add

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
        self._shapes = [x.shape for x in leaves]
        self._sizes = [x.numel() for x in leaves]

    def held(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Return leaves in this form."""
        return [torch.cat([x.reshape(-1) for x in leaves])] if self.joined else list(leaves)

    def leaves(self, held: Sequence[Tensor]) -> list[Tensor]:
        """Return views of the leaves, or of rows of them, from what holds them."""
        if not self.joined:
            return list(held)
        (vector,) = held
        lead = vector.shape[:-1]
        parts = vector.split(self._sizes, -1)
        return [x.view((*lead, *shape)) for x, shape in zip(parts, self._shapes)]

    def copies(self, held: Sequence[Tensor]) -> list[Tensor]:
        """Return leaves, each with memory of its own, so that keeping one does not keep all."""
        return [x.clone() for x in self.leaves(held)] if self.joined else list(held)

    def perturbed(
        self, held: Sequence[Tensor], noise: Sequence[Tensor], steps: Sequence[float]
    ) -> Callable[[int, int, int], list[Tensor]]:
        """Return a function that makes new points theta + step z, for a range of directions z.

        It takes the range and the number of the step. Each leaf of the points is contiguous: a
        batch of products of small matrices then takes 10 % less time than with rows of a matrix.
        """
        leaves, directions = self.leaves(held), self.leaves(noise)

        def make(start: int, stop: int, k: int) -> list[Tensor]:
            rows = [z[start:stop] for z in directions]
            points: list[Tensor] = list(foreach_add(leaves, rows, alpha=steps[k]))
            return points

        return make
