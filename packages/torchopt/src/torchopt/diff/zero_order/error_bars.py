# SPDX-License-Identifier: Apache-2.0
"""The standard error of an estimate, from the spread of independent blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["GradientEstimate", "Spread", "effective_sample_size", "scaled"]


class GradientEstimate(NamedTuple):
    """A zero-order gradient with its error bars.

    Attributes:
        gradient: The estimate, a tree like the parameters.
        standard_error: The estimated standard deviation of each entry of `gradient`, a tree like
            the parameters, from the spread of independent blocks of directions; see `Spread`. For a
            complex entry, its real and imaginary part are the errors of these parts. None if it was
            not requested or there are fewer than two blocks. It measures noise, not the smoothing
            bias of the estimator.
        effective_sample_size: (sum |c_i|)^2 / sum c_i^2, in [1, N]: how many of the N directions
            effectively contribute (L. Kish, Survey Sampling, 1965, for |c_i| as weights).
        evaluations: The number of evaluations of the function.

    Example:
        >>> from torchopt.diff.zero_order import Gaussian, ZeroOrder
        >>> engine = ZeroOrder(Gaussian(), "antithetic", num_samples=100)
        >>> found = engine.estimate(lambda x: (3 * x).sum(), torch.zeros(2), seed=0)
        >>> found.gradient.shape, found.evaluations
        (torch.Size([2]), 200)
    """

    gradient: Any
    standard_error: Any
    effective_sample_size: float
    evaluations: int


def scaled(coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Return coefficients divided by the largest modulus, and that modulus in float64.

    So the squares of the coefficients stay in the range of their dtype.
    """
    largest = coefficients.abs().amax()
    scale = torch.where(largest == 0, torch.ones_like(largest), largest)
    return coefficients / scale, scale.double()


def effective_sample_size(coefficients: Tensor) -> float:
    """Return (sum |c_i|)^2 / sum c_i^2, or N if all are zero.

    Example:
        >>> effective_sample_size(torch.ones(4)), effective_sample_size(torch.tensor([0.0, 3.0]))
        (4.0, 1.0)
    """
    c = coefficients.detach().to(device="cpu", dtype=torch.float64)
    if not c.any():
        return float(len(c))
    c, _ = scaled(c)
    return float(c.abs().sum().square() / c.square().sum())


class Spread:
    """Accumulates the variance of the mean of independent blocks of directions.

    There are q blocks of m directions, and a rest of r directions. With x_i = c_i d(z_i) and the
    sums S_b of x_i over a block, the variance of the mean g is (q v(m) + v(r)) / N^2, where v(n) is
    the variance of the sum of n directions of one block. v(m) is the sample variance of the S_b,
    and v(1) that of the x_i. v(r) follows from

        v(r) = r v(1) + r (r - 1) k,      k = (v(m) - m v(1)) / (m (m - 1)),

    where k is the covariance of two directions of a block. If there is only one whole block, k is
    assumed to be 0, which overestimates the error of directions that are coupled to reduce it.

    Sums of squares are float64, which has the range for any float32 gradient.

    Args:
        leaves: Tensors like the gradient.
        coupled: m, the number of directions in a block; the last block may be smaller.
        num_samples: N, the number of directions.
    """

    def __init__(self, leaves: Sequence[Tensor], coupled: int, num_samples: int) -> None:
        self.coupled = coupled
        self.num_samples = num_samples
        self.blocks, self.rest = divmod(num_samples, coupled)

        def zeros() -> list[Tensor]:
            return [torch.zeros_like(x, dtype=torch.float64) for x in leaves]

        by_block = coupled > 1 and self.blocks > 1
        self.of_each = zeros() if coupled == 1 or self.rest else None
        self.of_blocks = (zeros(), zeros()) if by_block else None

    def add(self, leaf: int, weights: Tensor, directions: Tensor) -> None:
        """Add a chunk of directions, which begins at a block.

        Args:
            leaf: The position of the leaf.
            weights: The coefficients, `[n]`.
            directions: The directions, `[n, *shape]`.
        """
        if self.of_each is not None:
            unit, scale = scaled(weights)
            part = torch.tensordot(unit.square(), directions.square(), dims=1)
            self.of_each[leaf].add_(part.double() * scale.square())
        if self.of_blocks is None:
            return
        sums, squares = self.of_blocks
        for i in range(0, len(weights) - self.coupled + 1, self.coupled):
            inside = slice(i, i + self.coupled)
            block = torch.tensordot(weights[inside], directions[inside], dims=1).double()
            sums[leaf].add_(block)
            squares[leaf].addcmul_(block, block)

    def standard_error(self, means: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the standard error of each entry, or None with fewer than two blocks."""
        if self.blocks + (self.rest > 0) < 2 or not self.blocks:
            return None
        return [self._of_leaf(k, g.double()).to(g.dtype) for k, g in enumerate(means)]

    def _of_leaf(self, leaf: int, mean: Tensor) -> Tensor:
        n, m, q, r = self.num_samples, self.coupled, self.blocks, self.rest
        single = torch.zeros_like(mean)  # v(1)
        if self.of_each is not None:
            single = (self.of_each[leaf] / n - mean.square()).clamp(min=0.0) * (n / (n - 1))
        block = m * single  # v(m)
        if self.of_blocks is not None:
            sums, squares = (x[leaf] for x in self.of_blocks)
            block = (squares - sums.square() / q).clamp(min=0.0) / (q - 1)
        total = q * block
        if r:
            covariance = (block - m * single) / (m * (m - 1))
            total = total + (r * single + r * (r - 1) * covariance).clamp(min=0.0)
        return total.sqrt() / n
