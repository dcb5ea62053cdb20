# SPDX-License-Identifier: Apache-2.0
"""How far to trust an estimate: the standard error from the spread of independent blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["GradientEstimate", "Spread", "effective_sample_size"]


class GradientEstimate(NamedTuple):
    """A zero-order gradient and how far to trust it.

    Attributes:
        gradient: Tree like the parameters.
        standard_error: Tree like the parameters: the estimated standard deviation of each entry of
            `gradient`, from the spread of independent blocks of directions. None if it was not
            asked for, and with fewer than two blocks. It measures noise, not the smoothing bias of
            the estimator.
        effective_sample_size: (sum |c_i|)^2 / sum c_i^2, in [1, N]: how many of the N directions
            carry the estimate (L. Kish, Survey Sampling, 1965, on the sizes of the coefficients).
        evaluations: Of the function.
    """

    gradient: Any
    standard_error: Any
    effective_sample_size: float
    evaluations: int


def effective_sample_size(coefficients: Tensor) -> float:
    """Return (sum |c_i|)^2 / sum c_i^2; N if all are zero."""
    squares = coefficients.square().sum()
    if squares == 0:
        return float(len(coefficients))
    return float(coefficients.abs().sum().square() / squares)


class Spread:
    """Accumulates the variance of the mean of independent blocks of directions.

    With block sums S_b over n_b directions and mean g = sum_b S_b / N, the variance of g is
    estimated by B / (B - 1) sum_b (S_b - n_b g)^2 / N^2.

    Args:
        leaves: Like the gradient.
        coupled: Directions in a block; the last block may be smaller.
        num_samples: N.
    """

    def __init__(self, leaves: Sequence[Tensor], coupled: int, num_samples: int) -> None:
        self.coupled = coupled
        self.num_samples = num_samples
        sizes = [min(coupled, num_samples - i) for i in range(0, num_samples, coupled)]
        self.blocks = len(sizes)
        self.sum_size_squares = float(sum(n * n for n in sizes))
        self.squares = [torch.zeros_like(x) for x in leaves]
        self.sized = [torch.zeros_like(x) for x in leaves]

    def add(self, leaf: int, weights: Tensor, directions: Tensor, total: Tensor) -> None:
        """Add a chunk, which begins at a block.

        Args:
            leaf: Which leaf.
            weights: `[n]`, coefficients.
            directions: `[n, *shape]`.
            total: `[*shape]`, the sum of weights times directions.
        """
        if self.coupled == 1:
            self.squares[leaf] += torch.tensordot(weights.square(), directions.square(), dims=1)
            self.sized[leaf] += total
            return
        for i in range(0, len(weights), self.coupled):
            part = weights[i : i + self.coupled]
            block = torch.tensordot(part, directions[i : i + self.coupled], dims=1)
            self.squares[leaf] += block.square()
            self.sized[leaf] += len(part) * block

    def standard_error(self, means: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the standard error of each entry, or None with fewer than two blocks."""
        if self.blocks < 2:
            return None
        factor = self.blocks / (self.blocks - 1) / self.num_samples**2
        return [
            (s2 - 2.0 * g * s1 + g.square() * self.sum_size_squares)
            .clamp(min=0.0)
            .mul(factor)
            .sqrt()
            for g, s2, s1 in zip(means, self.squares, self.sized)
        ]
