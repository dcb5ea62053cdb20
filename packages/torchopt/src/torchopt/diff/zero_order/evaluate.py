# SPDX-License-Identifier: Apache-2.0
"""Evaluate: losses at perturbed points, batched, and the estimates that follow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import Directions, common_draws
from torchopt.diff.zero_order.error_bars import Spread, effective_sample_size
from torchopt.diff.zero_order.estimators import (
    Estimator,
    Evaluations,
    control_variate,
    require_linear,
)
from torchopt.diff.zero_order.precision import accumulator, widened

__all__ = [
    "ENTRIES_PER_CHUNK",
    "Evaluator",
    "Sampling",
    "combine_losses",
    "estimate_leaves",
    "evaluate_range",
    "second_derivative",
    "square_norms",
]

# Entries of perturbed points held at once when no chunk size is given: 8 MiB in float32, which a
# cache holds (benchmarks/torchopt/zero_order).
ENTRIES_PER_CHUNK = 2**21


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
        with common_draws(seed, points):
            losses: Tensor = batched(*points, *copies)
        return losses

    @staticmethod
    def _loop(
        fn: Callable[..., Tensor], points: Sequence[Tensor], scratch: Sequence[Tensor], seed: int
    ) -> Tensor:
        losses = []
        with common_draws(seed, points) as seed_all:
            for row in zip(*points):
                seed_all(seed)
                losses.append(fn(*row, *(x.clone() for x in scratch)))
        return torch.stack(losses)


class LeafEstimate(NamedTuple):
    """`GradientEstimate` as lists of leaves."""

    gradient: list[Tensor]
    standard_error: list[Tensor] | None
    effective_sample_size: float
    evaluations: int


@dataclass(frozen=True)
class Sampling:
    """Where a function is evaluated, and what is made of its values.

    Attributes:
        directions: Source of the directions.
        estimator: From losses to coefficients.
        num_samples: N, number of directions.
        sigma: Size of the perturbation.
        seed: Names the directions.
        evaluator: Evaluates a chunk.
        chunk_size: Directions evaluated at once; None: as many as fit.
        scratch: Tensors that the function may overwrite.
        other_entries: Entries of other tensors that an evaluation works on; for the choice of a
            chunk size.
    """

    directions: Directions
    estimator: Estimator
    num_samples: int
    sigma: float
    seed: int
    evaluator: Evaluator
    chunk_size: int | None = None
    scratch: tuple[Tensor, ...] = ()
    other_entries: int = 0

    @property
    def inner_seed(self) -> int:
        """Return the seed of draws inside the function: not the stream of any direction."""
        return self.seed ^ 0x5DEECE66D

    def chunks(
        self, leaves: Sequence[Tensor], start: int = 0, stop: int | None = None
    ) -> list[tuple[int, int]]:
        """Return ranges of directions that are held at once, each beginning at a block."""
        stop = self.num_samples if stop is None else stop
        dimension = sum(leaf.numel() for leaf in leaves)
        coupled = self.directions.coupled(dimension)
        if self.chunk_size is None:
            entries = max(1, (dimension + self.other_entries) * len(self.estimator.offsets))
            rows = -(-max(1, ENTRIES_PER_CHUNK // entries) // coupled) * coupled
        else:
            rows = max(1, self.chunk_size // coupled) * coupled
        return [(i, min(i + rows, stop)) for i in range(start, stop, rows)]

    def coupled(self, leaves: Sequence[Tensor]) -> int:
        """Return how many consecutive directions depend on one another."""
        return self.directions.coupled(sum(leaf.numel() for leaf in leaves))

    def draw(self, leaves: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1`."""
        return self.directions.draw(leaves, self.seed, start, stop)

    def evaluate(
        self, fn: Callable[..., Tensor], leaves: Sequence[Tensor], noise: Sequence[Tensor]
    ) -> Tensor:
        """Return `fn` at theta + s sigma z for each direction and offset, `[n, K, *shape]`, in the
        dtype of sums.
        """
        n, offsets = len(noise[0]), self.estimator.offsets
        points = [leaf.new_empty((len(offsets) * n, *leaf.shape)) for leaf in leaves]
        for leaf, z, out in zip(leaves, noise, points):
            for row, s in enumerate(offsets):
                torch.add(leaf, z, alpha=s * self.sigma, out=out[row * n : (row + 1) * n])
        values = widened(self.evaluator(fn, points, self.scratch, self.inner_seed))
        return values.reshape(len(offsets), n, *values.shape[1:]).movedim(0, 1)

    def center(self, fn: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Tensor:
        """Return `fn` at theta, with the random draws of the perturbed evaluations."""
        points = [x[None].clone() for x in leaves]  # the function may overwrite them
        return widened(self.evaluator(fn, points, self.scratch, self.inner_seed)[0])


class _Sum:
    """Accumulates sum_i c_i d(z_i), in float32 or wider, and what its error bars need."""

    def __init__(self, sampling: Sampling, leaves: Sequence[Tensor], with_error: bool) -> None:
        self.sampling = sampling
        self.dtypes = [x.dtype for x in leaves]
        self.totals = [torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in leaves]
        self.coefficients: list[Tensor] = []
        self.scale: Tensor | None = None
        n = sampling.num_samples
        self.spread = Spread(leaves, sampling.coupled(leaves), n) if with_error else None

    def add(self, c: Tensor, noise: Sequence[Tensor]) -> None:
        """Add a chunk."""
        c = c if self.scale is None else c * self.scale.to(c)
        self.coefficients.append(c)
        for k, (total, z) in enumerate(zip(self.totals, noise)):
            d = self.sampling.estimator.dual(z.to(total.dtype))
            weights = c.to(total)
            total.add_(torch.tensordot(weights, d, dims=1))
            if self.spread is not None:
                self.spread.add(k, weights, d)

    def result(self, surrogate: Sequence[Tensor] | None = None) -> LeafEstimate:
        """Return the mean over all directions."""
        s = self.sampling
        means = [total.div_(s.num_samples) for total in self.totals]
        error = None if self.spread is None else self.spread.standard_error(means)
        if surrogate is not None:
            means = [m + h for m, h in zip(means, surrogate_mean(s, surrogate))]
        count = s.num_samples * len(s.estimator.offsets) + int(s.estimator.uses_center)
        effective = effective_sample_size(torch.cat(self.coefficients))
        return LeafEstimate(
            self._narrowed(means),
            None if error is None else self._narrowed(error),
            effective,
            count,
        )

    def _narrowed(self, wide: Sequence[Tensor]) -> list[Tensor]:
        return [x.to(dtype) for x, dtype in zip(wide, self.dtypes)]


def estimate_leaves(
    fn: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    sampling: Sampling,
    *,
    surrogate: Sequence[Tensor] | None = None,
    with_error: bool = False,
    scale: Tensor | None = None,
) -> LeafEstimate:
    """Return the estimated gradient of `fn` at `leaves`.

    One pass over the directions if each coefficient depends on its own losses alone. Otherwise two,
    losses and then the sum of coefficients times directions, for which the directions are
    regenerated from the seed: memory is O(chunk D + N), never O(N D).

    Args:
        fn: From leaves (and scratch) to a 0-dim loss.
        leaves: The point, plain tensors.
        sampling: Where to evaluate and what to make of it.
        surrogate: A gradient used as a control variate, for each leaf.
        with_error: Whether to accumulate the standard error.
        scale: 0-dim; the estimate is multiplied by it, before it is rounded to the dtypes of the
            leaves.

    Returns:
        New tensors.
    """
    estimator, sigma = sampling.estimator, sampling.sigma
    if surrogate is not None:
        surrogate_mean(sampling, surrogate)  # raises before anything is evaluated
    center = sampling.center(fn, leaves) if estimator.uses_center else None
    coupled = sampling.coupled(leaves)
    chunks = sampling.chunks(leaves)
    total = _Sum(sampling, leaves, with_error)
    total.scale = scale
    all_losses, all_norms, marks = [], [], []
    noise: list[Tensor] = []
    for start, stop in chunks:
        noise = sampling.draw(leaves, start, stop)
        losses = sampling.evaluate(fn, leaves, noise)
        if surrogate is not None:
            losses = control_variate(estimator, losses, noise, sigma, surrogate)
        norms = square_norms(noise, losses) if estimator.uses_norms else losses.new_empty(0)
        if estimator.local:
            e = Evaluations(losses, center, norms, sigma, coupled)
            total.add(estimator.coefficients(e), noise)
            continue
        all_losses.append(losses)
        all_norms.append(norms)
        marks.append(_mark(noise))
    if not estimator.local:
        e = Evaluations(torch.cat(all_losses), center, torch.cat(all_norms), sigma, coupled)
        c = estimator.coefficients(e)
        for mark, (start, stop) in zip(marks, chunks):
            if len(chunks) > 1:
                noise = sampling.draw(leaves, start, stop)
                if not all(torch.equal(x, y) for x, y in zip(_mark(noise), mark)):
                    raise RuntimeError(
                        "`distribution`: expected the same directions when they are drawn again "
                        "from the same seed, got others. Draw from torch's random generators, or "
                        f"pass a chunk_size of at least num_samples={sampling.num_samples}."
                    )
            total.add(c[start:stop], noise)
    return total.result(surrogate)


def surrogate_mean(sampling: Sampling, surrogate: Sequence[Tensor]) -> list[Tensor]:
    """Return E d(z) z'h: the mean of the estimate of a linear function with gradient h.

    Raises:
        ValueError: It is not known, or the estimator is not linear in the losses.
    """
    require_linear(sampling.estimator)
    moment = sampling.directions.second_moment(surrogate)
    if sampling.estimator.dual(torch.tensor(2.0)) == 2.0:
        return moment
    if any(not torch.equal(x, h) for x, h in zip(moment, surrogate)):
        raise ValueError(
            f"`surrogate`: expected directions of covariance I for {sampling.estimator.name}, got "
            f"{type(sampling.directions).__name__}. Use Rademacher()."
        )
    return moment


def _mark(noise: Sequence[Tensor]) -> list[Tensor]:
    """Return the first entries of directions, by which they are recognised."""
    return [z.reshape(len(z), -1)[:, :1].clone() for z in noise if z.numel()]


def evaluate_range(
    fn: Callable[..., Tensor], leaves: Sequence[Tensor], sampling: Sampling, start: int, stop: int
) -> Tensor:
    """Return the losses of directions `start` to `stop - 1`, `[stop - start, K]`."""
    parts = [
        sampling.evaluate(fn, leaves, sampling.draw(leaves, i, j))
        for i, j in sampling.chunks(leaves, start, stop)
    ]
    return torch.cat(parts)


def combine_losses(
    losses: Tensor,
    center: Tensor | None,
    leaves: Sequence[Tensor],
    sampling: Sampling,
    *,
    with_error: bool,
) -> LeafEstimate:
    """Return the estimate from the losses of all directions, `[N, K]`, regenerating those."""
    estimator, chunks = sampling.estimator, sampling.chunks(leaves)
    losses = widened(losses)
    center = None if center is None else widened(center)
    norms = [losses.new_empty(0)]
    if estimator.uses_norms:
        norms = [square_norms(sampling.draw(leaves, i, j), losses) for i, j in chunks]
    coupled = sampling.coupled(leaves)
    e = Evaluations(losses, center, torch.cat(norms), sampling.sigma, coupled)
    c = estimator.coefficients(e)
    total = _Sum(sampling, leaves, with_error)
    for start, stop in chunks:
        total.add(c[start:stop], sampling.draw(leaves, start, stop))
    return total.result()


def second_derivative(
    fn: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    cotangent: Tensor,
    tangents: Sequence[Tensor],
    sampling: Sampling,
) -> tuple[list[Tensor], Tensor]:
    """Return estimates of H v and J v, the derivatives of the gradient J' c in direction v.

    With h the estimator's curvature coefficients of the losses <c, fn>,

        H v = 1/N sum_i h_i ((z_i'v) z_i - v),      J v = 1/N sum_i c_i (z_i'v),

    the coefficients c_i taken of each entry of the output. The estimate of H is symmetric.

    Args:
        fn: From leaves (and scratch) to a tensor, the output.
        leaves: The point.
        cotangent: c, like the output.
        tangents: v, like the leaves.
        sampling: With standard normal directions and an estimator that has a curvature.
    """
    estimator, chunks = sampling.estimator, sampling.chunks(leaves)
    assert estimator.curvature is not None
    center = sampling.center(fn, leaves)
    outputs, slopes = [], []
    for start, stop in chunks:
        noise = sampling.draw(leaves, start, stop)
        outputs.append(sampling.evaluate(fn, leaves, noise))
        slopes.append(_inner(noise, tangents, center))
    values, slope = torch.cat(outputs), torch.cat(slopes)
    n, k = values.shape[:2]
    empty, coupled = values.new_empty(0), sampling.coupled(leaves)
    weights = cotangent.flatten().to(values)
    losses = values.reshape(n, k, -1) @ weights
    at_center = center.flatten() @ weights
    h = estimator.curvature(Evaluations(losses, at_center, empty, sampling.sigma, coupled))

    def coefficients(column: Tensor, middle: Tensor) -> Tensor:
        return estimator.coefficients(Evaluations(column, middle, empty, sampling.sigma, coupled))

    columns = torch.func.vmap(coefficients, (2, 0), 1)(values.reshape(n, k, -1), center.flatten())
    along = (slope @ columns / n).reshape(cotangent.shape).to(cotangent)
    wide = [v.to(accumulator(v.dtype)) for v in tangents]
    products = [-h.mean().to(v) * v for v in wide]
    for start, stop in chunks:
        for product, z in zip(products, sampling.draw(leaves, start, stop)):
            c = (h[start:stop] * slope[start:stop] / n).to(product)
            product.add_(torch.tensordot(c, z.to(product.dtype), dims=1))
    return [x.to(v.dtype) for x, v in zip(products, tangents)], along


def square_norms(noise: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return norm(z_i)^2 over all leaves, `[n]`."""
    norms = torch.zeros(len(noise[0]), dtype=like.dtype, device=like.device)
    for z in noise:
        flat = z.reshape(len(z), z[0].numel()).to(accumulator(z.dtype))
        norms += flat.square().sum(1).to(norms)
    return norms


def _inner(noise: Sequence[Tensor], tangents: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return z_i'v over all leaves, `[n]`."""
    total = torch.zeros(len(noise[0]), dtype=like.dtype, device=like.device)
    for z, v in zip(noise, tangents):
        dtype = accumulator(z.dtype)
        total += (z.reshape(len(z), v.numel()).to(dtype) @ v.flatten().to(dtype)).to(total)
    return total
