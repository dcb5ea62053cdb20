# SPDX-License-Identifier: Apache-2.0
"""Losses at perturbed points of a list of leaves, and the estimates that follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import Directions
from torchopt.diff.zero_order.error_bars import Spread, effective_sample_size
from torchopt.diff.zero_order.estimators import (
    Estimator,
    Evaluations,
)
from torchopt.diff.zero_order.evaluator import Evaluator
from torchopt.diff.zero_order.loop import sum_over_directions
from torchopt.diff.zero_order.precision import accumulator, widened
from torchopt.diff.zero_order.surrogate import control_variate, surrogate_mean

__all__ = [
    "ENTRIES_PER_CHUNK",
    "Sampling",
    "estimate_leaves",
    "evaluate_range",
    "second_derivative",
]

# Entries of perturbed points held at once when no chunk size is given: 32 MiB in float32. A chunk
# costs about a millisecond on top of the function; four times as many of them cost 3 to 8 % on the
# networks of benchmarks/torchopt/zero_order, and a vmap by hand holds everything.
ENTRIES_PER_CHUNK = 2**23


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
            means = [
                m + h for m, h in zip(means, surrogate_mean(s.estimator, s.directions, surrogate))
            ]
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


@dataclass
class _Leaves:
    """The space of some leaves, in which `fn` is evaluated."""

    fn: Callable[..., Tensor]
    leaves: Sequence[Tensor]
    sampling: Sampling
    surrogate: Sequence[Tensor] | None = None
    _marks: dict[int, list[Tensor]] = field(default_factory=dict)

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        return self.sampling.chunks(self.leaves)

    @cached_property
    def coupled(self) -> int:
        return self.sampling.coupled(self.leaves)

    @property
    def sigma(self) -> float:
        return self.sampling.sigma

    @property
    def draws_again(self) -> bool:
        return len(self.chunks) > 1 and not self.sampling.estimator.local

    def draw(self, start: int, stop: int) -> list[Tensor]:
        noise = self.sampling.draw(self.leaves, start, stop)
        if not self.draws_again:
            return noise
        mark = [z.reshape(len(z), -1)[:, :1].clone() for z in noise if z.numel()]
        if not all(map(torch.equal, mark, self._marks.setdefault(start, mark))):
            raise RuntimeError(
                "`distribution`: expected the same directions when they are drawn again "
                "from the same seed, got others. Draw from torch's random generators, or "
                f"pass a chunk_size of at least num_samples={self.sampling.num_samples}."
            )
        return noise

    def evaluate(self, noise: Sequence[Tensor]) -> Tensor:
        values = self.sampling.evaluate(self.fn, self.leaves, noise)
        if self.surrogate is None:
            return values
        estimator = self.sampling.estimator
        return control_variate(estimator, values, noise, self.sigma, self.surrogate)

    def square_norms(self, noise: Sequence[Tensor], like: Tensor) -> Tensor:
        norms = torch.zeros(len(noise[0]), dtype=like.dtype, device=like.device)
        for z in noise:
            norms += _rows(z).square().sum(1).to(norms)
        return norms


def estimate_leaves(
    fn: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    sampling: Sampling,
    *,
    losses: Tensor | None = None,
    center: Tensor | None = None,
    surrogate: Sequence[Tensor] | None = None,
    with_error: bool = False,
    scale: Tensor | None = None,
) -> LeafEstimate:
    """Return the estimated gradient of `fn` at `leaves`; see `sum_over_directions`.

    Args:
        fn: From leaves (and scratch) to a 0-dim loss.
        leaves: The point, plain tensors.
        sampling: Where to evaluate and what to make of it.
        losses: Those of all directions, `[N, K]`, where they are known: `fn` is not called.
        center: The loss at the point, where losses are known and the estimator uses it.
        surrogate: A gradient used as a control variate, for each leaf.
        with_error: Whether to accumulate the standard error.
        scale: 0-dim; the estimate is multiplied by it, before it is rounded to the dtypes of the
            leaves.

    Returns:
        New tensors.
    """
    estimator = sampling.estimator
    if surrogate is not None:
        surrogate_mean(
            estimator, sampling.directions, surrogate
        )  # raises before anything is evaluated
    if estimator.uses_center:
        center = sampling.center(fn, leaves) if losses is None else center
    total = _Sum(sampling, leaves, with_error)
    total.scale = scale
    sum_over_directions(
        _Leaves(fn, leaves, sampling, surrogate),
        estimator.coefficients,
        total.add,
        center=None if center is None else widened(center),
        losses=losses,
        local=estimator.local,
        uses_norms=estimator.uses_norms,
    )
    return total.result(surrogate)


def evaluate_range(
    fn: Callable[..., Tensor], leaves: Sequence[Tensor], sampling: Sampling, start: int, stop: int
) -> Tensor:
    """Return the losses of directions `start` to `stop - 1`, `[stop - start, K]`."""
    parts = [
        sampling.evaluate(fn, leaves, sampling.draw(leaves, i, j))
        for i, j in sampling.chunks(leaves, start, stop)
    ]
    return torch.cat(parts)


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
    estimator = sampling.estimator
    center = sampling.center(fn, leaves)
    space = _WithSlopes(fn, leaves, sampling, tangents=tangents)
    wide = [v.to(accumulator(v.dtype)) for v in tangents]
    products: list[Tensor] = []
    along = torch.empty(0)

    def weigh(e: Evaluations) -> Tensor:
        nonlocal along
        assert estimator.curvature is not None
        slope = torch.cat(space.slopes)
        n, k = e.losses.shape[:2]
        values, middle = e.losses.reshape(n, k, -1), center.flatten()
        weights = cotangent.flatten().to(values)
        of_product = replace(e, losses=values @ weights, center=middle @ weights)
        h = estimator.curvature(of_product)

        def coefficients(column: Tensor, at_center: Tensor) -> Tensor:
            return estimator.coefficients(replace(e, losses=column, center=at_center))

        columns = torch.func.vmap(coefficients, (2, 0), 1)(values, middle)
        along = (slope @ columns / n).reshape(cotangent.shape).to(cotangent)
        products.extend(-h.mean().to(v) * v for v in wide)
        return h * slope / n

    def add(c: Tensor, noise: Sequence[Tensor]) -> None:
        for product, z in zip(products, noise):
            product.add_(torch.tensordot(c.to(product), z.to(product.dtype), dims=1))

    sum_over_directions(space, weigh, add)
    return [x.to(v.dtype) for x, v in zip(products, tangents)], along


@dataclass
class _WithSlopes(_Leaves):
    """The same, remembering z_i'v, the slope of a direction v along each of those evaluated."""

    tangents: Sequence[Tensor] = ()
    slopes: list[Tensor] = field(default_factory=list)

    @property
    def draws_again(self) -> bool:
        return len(self.chunks) > 1

    def evaluate(self, noise: Sequence[Tensor]) -> Tensor:
        values = super().evaluate(noise)
        slope = torch.zeros(len(values), dtype=values.dtype, device=values.device)
        for z, v in zip(noise, self.tangents):
            slope += (_rows(z) @ _rows(v[None])[0]).to(slope)
        self.slopes.append(slope)
        return values


def _rows(z: Tensor) -> Tensor:
    """Return directions of one leaf as rows, in the dtype of sums."""
    return z.reshape(len(z), z[0].numel()).to(accumulator(z.dtype))
