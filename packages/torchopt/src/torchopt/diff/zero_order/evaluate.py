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
from torchopt.diff.zero_order.evaluator import Evaluator, Points
from torchopt.diff.zero_order.form import Form
from torchopt.diff.zero_order.loop import sum_over_directions
from torchopt.diff.zero_order.precision import accumulator, widened
from torchopt.diff.zero_order.surrogate import control_variate, surrogate_mean
from torchopt.precision import without_autocast

__all__ = [
    "ENTRIES_PER_CHUNK",
    "Sampling",
    "estimate_leaves",
    "evaluate_range",
    "second_derivative",
]

# Entries of directions, of the points that are evaluated together, and of the other arguments of
# their evaluations, in memory if no chunk size is given: 32 MiB in float32 for each of the three.
ENTRIES_PER_CHUNK = 2**23


def _ratio_up(x: int, y: int) -> int:
    """Return x / y, rounded up."""
    return -(-x // y)


class LeafEstimate(NamedTuple):
    """`GradientEstimate` as lists of leaves, with the coefficients of all directions."""

    gradient: list[Tensor]
    standard_error: list[Tensor] | None
    coefficients: Tensor
    evaluations: int

    @property
    def effective_sample_size(self) -> float:
        """Return the number of directions that effectively contribute."""
        return effective_sample_size(self.coefficients)


@dataclass(frozen=True)
class Sampling:
    """The settings of an estimate: where to evaluate, and how to use the values.

    Attributes:
        directions: The source of the directions.
        estimator: The estimator, which computes coefficients from losses.
        num_samples: N, the number of directions.
        sigma: The size of the perturbation.
        seed: Determines the directions.
        evaluator: Evaluates the function at the points of a chunk.
        chunk_size: How many directions are evaluated together; None: as many as fit.
        scratch: Tensors that the function may overwrite.
        other_entries: The number of entries of other tensors that an evaluation uses.
        draws_outside: Whether the function may draw from the generators of Python or numpy.
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
    draws_outside: bool = True

    @property
    def inner_seed(self) -> int:
        """Return the seed for draws inside the function, different from those of directions."""
        return self.seed ^ 0x5DEECE66D

    def chunks(
        self, leaves: Sequence[Tensor], start: int = 0, stop: int | None = None
    ) -> list[tuple[int, int]]:
        """Return the ranges of directions of the chunks, each beginning at a block.

        Without a chunk size, chunks are about equally large.
        """
        stop = self.num_samples if stop is None else stop
        dimension = sum(leaf.numel() for leaf in leaves)
        unit = self.directions.coupled(dimension)
        if self.chunk_size is None:
            most = max(1, ENTRIES_PER_CHUNK // max(1, dimension * len(self.estimator.offsets)))
            rows = _ratio_up(stop - start, _ratio_up(stop - start, most))
            drawn = self.directions.drawn_together(dimension)
            unit = drawn if drawn <= most else unit
            rows = _ratio_up(rows, unit) * unit
        else:
            rows = max(1, self.chunk_size // unit) * unit
        return [(i, min(i + rows, stop)) for i in range(start, stop, rows)]

    def coupled(self, leaves: Sequence[Tensor]) -> int:
        """Return how many consecutive directions depend on one another."""
        return self.directions.coupled(sum(leaf.numel() for leaf in leaves))

    def draw(self, leaves: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1`."""
        return self.directions.draw(leaves, self.seed, start, stop)

    def form(self, leaves: Sequence[Tensor]) -> Form:
        """Return how leaves are held in an estimate."""
        return Form(leaves, self.directions, self.estimator)

    def evaluate(
        self, fn: Callable[..., Tensor], held: Sequence[Tensor], noise: Sequence[Tensor], form: Form
    ) -> Tensor:
        """Return `fn` at theta + s sigma z for each direction and offset, `[n, K, *shape]`.

        The result has the dtype of sums.

        Args:
            fn: Maps leaves and scratch to a tensor.
            held: theta, as `form` holds it.
            noise: The directions, `[n, *shape]` for each tensor of theta.
            form: How theta is held.
        """
        n, steps = len(noise[0]), [s * self.sigma for s in self.estimator.offsets]
        entries = sum(x.numel() for x in held)
        make = form.perturbed(held, noise, steps)
        most = ENTRIES_PER_CHUNK // max(1, entries + self.other_entries)
        points = Points(n, len(steps), entries, make, held, most)
        values = widened(self._values(fn, points))
        return values.reshape(n, len(steps), *values.shape[1:])

    def center(self, fn: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Tensor:
        """Return `fn` at theta, with the same random draws as at perturbed points."""
        # Copies, which the function may overwrite.
        points = Points(1, 1, 0, lambda i, j, places: [x[None].clone() for x in leaves], leaves)
        return widened(self._values(fn, points)[0])

    def _values(self, fn: Callable[..., Tensor], points: Points) -> Tensor:
        outside = self.draws_outside
        return self.evaluator(fn, points, self.scratch, self.inner_seed, outside=outside)


class _Sum:
    """Accumulates sum_i c_i d(z_i), in float32 or wider, and the sums for its error bars."""

    def __init__(
        self, sampling: Sampling, held: Sequence[Tensor], form: Form, with_error: bool
    ) -> None:
        self.sampling = sampling
        self.form = form
        self.dtypes = [x.dtype for x in held]
        self.totals = [torch.zeros_like(x, dtype=accumulator(x.dtype)) for x in held]
        self.coefficients: list[Tensor] = []
        self.scale: Tensor | None = None
        n = sampling.num_samples
        self.spread = Spread(held, sampling.coupled(held), n) if with_error else None

    def add(self, c: Tensor, noise: Sequence[Tensor]) -> None:
        """Add a chunk."""
        c = c if self.scale is None else c * self.scale.to(c)
        self.coefficients.append(c)
        for k, (total, z) in enumerate(zip(self.totals, noise)):
            d = self.sampling.estimator.dual(z.to(total.dtype))
            weights = c.to(total)
            total.add_(weights @ d if d.ndim == 2 else torch.tensordot(weights, d, dims=1))
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
        return LeafEstimate(
            self._narrowed(means),
            None if error is None else self._narrowed(error),
            torch.cat(self.coefficients) if len(self.coefficients) > 1 else self.coefficients[0],
            count,
        )

    def _narrowed(self, wide: Sequence[Tensor]) -> list[Tensor]:
        return self.form.copies([x.to(dtype) for x, dtype in zip(wide, self.dtypes)])


@dataclass
class _Leaves:
    """The space of the leaves at which `fn` is evaluated, as `form` holds them."""

    fn: Callable[..., Tensor]
    leaves: Sequence[Tensor]
    form: Form
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
        values = self.sampling.evaluate(self.fn, self.leaves, noise, self.form)
        if self.surrogate is None:
            return values
        estimator = self.sampling.estimator
        with without_autocast():
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
        fn: Maps leaves (and scratch) to a 0-dim loss.
        leaves: The point, plain tensors.
        sampling: The settings of the estimate.
        losses: The losses of all directions, `[N, K]`, if they are known; then `fn` is not called.
        center: The loss at the point, if losses are known and the estimator uses it.
        surrogate: A gradient used as a control variate, one tensor for each leaf.
        with_error: Whether to estimate the standard error.
        scale: A 0-dim factor of the estimate, applied before rounding to the dtypes of the leaves.

    Returns:
        New tensors.
    """
    estimator, form = sampling.estimator, sampling.form(leaves)
    held = form.held(leaves)
    if surrogate is not None:
        surrogate = form.held(surrogate)
        # Raises before anything is evaluated.
        surrogate_mean(estimator, sampling.directions, surrogate)
    if estimator.uses_center:
        center = sampling.center(fn, leaves) if losses is None else center
    total = _Sum(sampling, held, form, with_error)
    total.scale = scale
    sum_over_directions(
        _Leaves(fn, held, form, sampling, surrogate),
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
    form = sampling.form(leaves)
    held = form.held(leaves)
    parts = [
        sampling.evaluate(fn, held, sampling.draw(held, i, j), form)
        for i, j in sampling.chunks(held, start, stop)
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

    With the estimator's curvature coefficients h of the losses <c, fn>,

        H v = 1/N sum_i h_i ((z_i'v) z_i - v),      J v = 1/N sum_i c_i (z_i'v),

    with coefficients c_i for each entry of the output. The estimate of H is symmetric.

    Args:
        fn: Maps leaves (and scratch) to a tensor, the output.
        leaves: The point.
        cotangent: c, a tensor like the output.
        tangents: v, tensors like the leaves.
        sampling: The settings; directions must be standard normal, and the estimator must have a
            curvature.
    """
    estimator, form = sampling.estimator, sampling.form(leaves)
    center = sampling.center(fn, leaves)
    tangents = form.held(tangents)
    space = _WithSlopes(fn, form.held(leaves), form, sampling, tangents=tangents)
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
        sums = (values * weights).sum(-1), (middle * weights).sum()  # autocast rounds products
        of_product = replace(e, losses=sums[0], center=sums[1])
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
    return form.copies([x.to(v.dtype) for x, v in zip(products, tangents)]), along


@dataclass
class _WithSlopes(_Leaves):
    """The same space, which also records z_i'v for a direction v and each direction z_i."""

    tangents: Sequence[Tensor] = ()
    slopes: list[Tensor] = field(default_factory=list)

    @property
    def draws_again(self) -> bool:
        return len(self.chunks) > 1

    def evaluate(self, noise: Sequence[Tensor]) -> Tensor:
        values = super().evaluate(noise)
        slope = torch.zeros(len(values), dtype=values.dtype, device=values.device)
        with without_autocast():
            for z, v in zip(noise, self.tangents):
                slope += (_rows(z) @ _rows(v[None])[0]).to(slope)
        self.slopes.append(slope)
        return values


def _rows(z: Tensor) -> Tensor:
    """Return directions of one leaf as rows, in the dtype of sums."""
    return z.reshape(len(z), z[0].numel()).to(accumulator(z.dtype))
