# SPDX-License-Identifier: Apache-2.0
"""Evaluate: losses at perturbed points, batched, and the gradient estimate that follows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import Directions, seeded
from torchopt.diff.zero_order.estimators import Estimator, Evaluations, control_variate

__all__ = ["Evaluator", "GradientEstimate", "estimate_leaves", "rows_per_chunk"]

# Entries of noise held at once when no chunk size is given: 32 MiB in float64.
_ENTRIES_PER_CHUNK = 2**22


class GradientEstimate(NamedTuple):
    """A zero-order gradient and how far to trust it.

    Attributes:
        gradient: Tree like the parameters.
        standard_error: Tree like the parameters: the estimated standard deviation of each entry of
            `gradient`, from the spread of independent blocks of directions. None with fewer than
            two blocks. It measures noise, not the smoothing bias of the estimator.
        effective_sample_size: (sum |c_i|)^2 / sum c_i^2, in [1, N]: how many of the N directions
            carry the estimate (L. Kish, Survey Sampling, 1965, on the sizes of the coefficients).
        evaluations: Of the function.
    """

    gradient: Any
    standard_error: Any
    effective_sample_size: float
    evaluations: int


@dataclass
class Evaluator:
    """Calls a function at many points: by `torch.func.vmap`, or one after the other.

    Random draws inside the function (dropout) see the same seed in every evaluation, so that losses
    differ by the perturbation alone.

    Attributes:
        vectorized: True: by vmap, its errors are raised. False: in a loop. None: by vmap,
            and, after one warning, in a loop if the function runs there but not under vmap.
    """

    vectorized: bool | None = None

    def __call__(
        self,
        fn: Callable[..., Tensor],
        points: Sequence[Tensor],
        scratch: Sequence[Tensor],
        seed: int,
    ) -> Tensor:
        """Return `fn(*leaves, *scratch)` at each point, stacked.

        Args:
            fn: Returns a tensor of the same shape everywhere.
            points: For each leaf `[n, *shape]`.
            scratch: Tensors that `fn` may overwrite; each evaluation gets copies of its own.
            seed: Of random draws inside `fn`.

        Returns:
            `[n, *shape of the output]`.
        """
        if self.vectorized is False:
            return self._loop(fn, points, scratch, seed)
        try:
            return self._vmap(fn, points, scratch, seed)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if self.vectorized or isinstance(error, torch.OutOfMemoryError):
                raise
            losses = self._loop(fn, points, scratch, seed)  # raises what is not vmap's fault
            first = str(error).strip().partition("\n")[0]
            warnings.warn(
                "zero-order estimation: torch.func.vmap cannot take this function, so it is "
                f"evaluated in a loop, one sample after the other. vmap says: {first} "
                "Pass vectorized=False to accept the loop, vectorized=True to get the full error.",
                UserWarning,
                stacklevel=2,
            )
            self.vectorized = False
            return losses

    @staticmethod
    def _vmap(
        fn: Callable[..., Tensor], points: Sequence[Tensor], scratch: Sequence[Tensor], seed: int
    ) -> Tensor:
        n = len(points[0])
        copies = [x.expand(n, *x.shape).clone() for x in scratch]
        batched = torch.func.vmap(fn, randomness="same")
        with seeded(seed, points):
            losses: Tensor = batched(*points, *copies)
        return losses

    @staticmethod
    def _loop(
        fn: Callable[..., Tensor], points: Sequence[Tensor], scratch: Sequence[Tensor], seed: int
    ) -> Tensor:
        losses = []
        for row in zip(*points):
            with seeded(seed, points):
                losses.append(fn(*row, *(x.clone() for x in scratch)))
        return torch.stack(losses)


def rows_per_chunk(chunk_size: int | None, dimension: int, coupled: int, num_samples: int) -> int:
    """Return how many directions are held at once: a multiple of `coupled`."""
    rows = max(1, _ENTRIES_PER_CHUNK // max(dimension, 1)) if chunk_size is None else chunk_size
    rows = min(rows, num_samples)
    return max(1, -(-rows // coupled) if chunk_size is None else rows // coupled) * coupled


class LeafEstimate(NamedTuple):
    """`GradientEstimate` as lists of leaves."""

    gradient: list[Tensor]
    standard_error: list[Tensor] | None
    effective_sample_size: float
    evaluations: int


def estimate_leaves(
    fn: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    *,
    directions: Directions,
    estimator: Estimator,
    num_samples: int,
    sigma: float,
    seed: int,
    chunk_size: int | None,
    evaluator: Evaluator,
    scratch: Sequence[Tensor] = (),
    surrogate: Sequence[Tensor] | None = None,
    with_error: bool = False,
) -> LeafEstimate:
    """Return the estimated gradient of `fn` at `leaves`.

    Two passes over the directions: losses, then the sum of coefficients times directions. With more
    than one chunk the directions of the second pass are regenerated from the seed, so that memory
    is O(chunk D + N), never O(N D).

    Args:
        fn: From leaves (and scratch) to a 0-dim loss.
        leaves: The point, plain tensors.
        directions: Source of the directions.
        estimator: From losses to coefficients.
        num_samples: N, number of directions.
        sigma: Size of the perturbation.
        seed: Names the directions.
        chunk_size: Directions evaluated at once; None: as many as fit 2**22 entries.
        evaluator: Evaluates the chunk.
        scratch: Tensors that `fn` may overwrite.
        surrogate: A gradient used as a control variate, for each leaf.
        with_error: Whether to accumulate the standard error.

    Returns:
        New tensors.
    """
    dimension = sum(leaf.numel() for leaf in leaves)
    coupled = directions.coupled(dimension)
    rows = rows_per_chunk(chunk_size, dimension, coupled, num_samples)
    chunks = [(i, min(i + rows, num_samples)) for i in range(0, num_samples, rows)]
    inner_seed = seed ^ 0x5DEECE66D  # of draws inside fn: not the stream of any direction

    center = None
    if estimator.uses_center:
        center = evaluator(fn, [x[None] for x in leaves], scratch, inner_seed)[0]
    all_losses, all_norms = [], []
    noise: list[Tensor] = []
    for start, stop in chunks:
        noise = directions.draw(leaves, seed, start, stop)
        columns = [
            evaluator(
                fn,
                [torch.add(x, z, alpha=s * sigma) for x, z in zip(leaves, noise)],
                scratch,
                inner_seed,
            )
            for s in estimator.offsets
        ]
        losses = torch.stack(columns, dim=1)
        if surrogate is not None:
            losses = control_variate(estimator, losses, noise, sigma, surrogate)
        all_losses.append(losses)
        all_norms.append(_square_norms(noise, losses))
    evaluations = Evaluations(torch.cat(all_losses), center, torch.cat(all_norms), sigma)
    c = estimator.coefficients(evaluations)

    totals = [torch.zeros_like(x) for x in leaves]
    spread = _Spread(leaves, coupled, num_samples) if with_error else None
    for number, (start, stop) in enumerate(chunks):
        if len(chunks) > 1:
            noise = directions.draw(leaves, seed, start, stop)
            if not torch.equal(_square_norms(noise, all_norms[number]), all_norms[number]):
                raise RuntimeError(
                    "`distribution`: expected the same directions when they are drawn again from "
                    "the same seed, got others. Draw from torch's random generators, or pass a "
                    f"chunk_size of at least num_samples={num_samples}."
                )
        for k, (total, z) in enumerate(zip(totals, noise)):
            d = estimator.dual(z)
            weights = c[start:stop].to(device=z.device, dtype=z.dtype)
            total.add_(torch.tensordot(weights, d, dims=1), alpha=1.0 / num_samples)
            if spread is not None:
                spread.add(k, weights, d)
    error = None if spread is None else spread.standard_error(totals)
    if surrogate is not None:
        totals = [total + h for total, h in zip(totals, surrogate)]
    squares = c.square().sum()
    effective = float(c.abs().sum().square() / squares) if squares > 0 else float(num_samples)
    count = num_samples * len(estimator.offsets) + int(estimator.uses_center)
    return LeafEstimate(totals, error, effective, count)


def _square_norms(noise: Sequence[Tensor], like: Tensor) -> Tensor:
    norms = torch.zeros(len(noise[0]), dtype=like.dtype, device=like.device)
    for z in noise:
        norms += z.reshape(len(z), z[0].numel()).square().sum(1).to(norms)
    return norms


class _Spread:
    """Accumulates the variance of the mean of independent blocks of directions.

    With block sums S_b over n_b directions and mean g = sum_b S_b / N, the variance of g is
    estimated by B / (B - 1) sum_b (S_b - n_b g)^2 / N^2.
    """

    def __init__(self, leaves: Sequence[Tensor], coupled: int, num_samples: int) -> None:
        self.coupled = coupled
        self.num_samples = num_samples
        sizes = [min(coupled, num_samples - i) for i in range(0, num_samples, coupled)]
        self.blocks = len(sizes)
        self.sum_size_squares = float(sum(n * n for n in sizes))
        self.squares = [torch.zeros_like(x) for x in leaves]
        self.sized = [torch.zeros_like(x) for x in leaves]

    def add(self, leaf: int, weights: Tensor, directions: Tensor) -> None:
        """Add a chunk, which begins at a block."""
        if self.coupled == 1:
            self.squares[leaf] += torch.tensordot(weights.square(), directions.square(), dims=1)
            self.sized[leaf] += torch.tensordot(weights, directions, dims=1)
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
