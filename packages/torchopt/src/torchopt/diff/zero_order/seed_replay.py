# SPDX-License-Identifier: Apache-2.0
"""Gradients of large models as seeds: perturb in place, and replay the noise for the update.

A `SeedGradient` holds a seed and one coefficient for each direction. The gradient
g = 1/N sum_i c_i z_i is never stored: it is generated leaf by leaf and added to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.call_state import CallState
from torchopt.diff.zero_order.directions import Gaussian, Rademacher, common_draws, draw_seed
from torchopt.diff.zero_order.error_bars import GradientEstimate, effective_sample_size
from torchopt.diff.zero_order.estimators import Estimator, Evaluations, as_estimator
from torchopt.diff.zero_order.layout import as_stored, is_perturbed
from torchopt.diff.zero_order.precision import (
    accumulator,
    require_sigma,
    warn_of_lost_perturbations,
    widened,
)
from torchopt.precision import forget_casts
from torchopt.tree_function import uncompiled

__all__ = ["SeedGradient", "combine", "estimate", "losses", "perturbed"]


@dataclass(frozen=True, eq=False)
class SeedGradient:
    """A zero-order gradient that consists of N numbers, whatever the size of the model.

    Attributes:
        seed: Determines the directions.
        coefficients: The coefficients c, `[N]`.
        directions: The source of the directions.
        estimator: The estimator, whose `dual` is applied to the directions.
        evaluations: The number of evaluations of the loss.
    """

    seed: int
    coefficients: Tensor
    directions: Gaussian | Rademacher
    estimator: Estimator
    evaluations: int

    @property
    def effective_sample_size(self) -> float:
        """How many of the N directions effectively contribute; see `GradientEstimate`."""
        return effective_sample_size(self.coefficients)

    @torch.no_grad()
    def add_to_(self, params: Sequence[Tensor], scale: float) -> None:
        """Add `scale * gradient` to `params` in place; `scale = -lr` is a step of SGD.

        It holds one leaf of one direction at a time (for small models, one direction).
        Half-precision parameters are summed in float32, which takes one float32 copy of them.
        """
        real = _real(params)
        totals = [p if p.dtype == accumulator(p.dtype) else p.float() for p in real]
        n = len(self.coefficients)
        for c, z in self._terms(real):
            for total, d in zip(totals, z):
                total.add_(d.to(total.dtype), alpha=scale * c / n)
        for p, total in zip(real, totals):
            if total is not p:
                p.copy_(total)
        forget_casts()

    def _terms(self, params: Sequence[Tensor]) -> Iterator[tuple[float, Iterator[Tensor]]]:
        """Yield the coefficient of each direction, and its dual leaf by leaf."""
        for i, c in enumerate(self.coefficients.tolist()):
            leaves = self.directions.leaves(params, self.seed, i)
            yield c, (self.estimator.dual(z.to(accumulator(z.dtype))) for z in leaves)

    def materialize(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient as tensors like `params`."""
        return _stored(self._mean(params), params)

    def _mean(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradient as real tensors in the dtype of sums."""
        n, real = len(self.coefficients), _real(params)
        totals = [torch.zeros_like(p, dtype=accumulator(p.dtype)) for p in real]
        for c, z in self._terms(real):
            for total, d in zip(totals, z):
                total.add_(d, alpha=c / n)
        return totals

    @torch.no_grad()
    def with_error_bars(self, params: Sequence[Tensor]) -> GradientEstimate:
        """Return the gradient and its standard error as tensors like `params`."""
        n, real = len(self.coefficients), _real(params)
        means = self._mean(params)
        squares = [torch.zeros_like(g, dtype=torch.float64) for g in means]
        for c, z in self._terms(real):
            for square, d in zip(squares, z):
                square.add_(d.square().double(), alpha=c * c / n)
        error = None
        if n > 1:
            variances = (s - g.double().square() for s, g in zip(squares, means))
            error = _stored([(v.clamp(min=0.0) / (n - 1)).sqrt() for v in variances], params)
        return GradientEstimate(
            _stored(means, params), error, self.effective_sample_size, self.evaluations
        )


def _real(params: Sequence[Tensor]) -> list[Tensor]:
    """Return parameters as real tensors that share their memory.

    Raises:
        TypeError: A parameter cannot be perturbed.
    """
    for k, p in enumerate(params):
        if not is_perturbed(p) or p.is_conj():
            got = f"a conjugated view of {p.dtype}" if is_perturbed(p) else _kind(p)
            raise TypeError(
                f"`params`: expected floating-point or complex tensors, got {got} at {k}. Leave it "
                "out."
            )
    return [torch.view_as_real(p.detach()) if p.is_complex() else p.detach() for p in params]


def _kind(p: Any) -> str:
    return str(p.dtype) if isinstance(p, Tensor) else type(p).__name__


def _stored(real: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Return real tensors as tensors of the dtypes of `params`."""
    parts = (torch.view_as_real(p.detach()) if p.is_complex() else p for p in params)
    return [as_stored(x.to(y.dtype), p) for x, y, p in zip(real, parts, params)]


@contextmanager
def perturbed(
    params: Sequence[Tensor],
    seed: int,
    member: int,
    scale: float,
    directions: Gaussian | Rademacher | None = None,
    backup: Sequence[Tensor] | None = None,
) -> Iterator[None]:
    """Set `params` to `params + scale * z` inside the context, and restore every bit on exit.

    They are also restored after an exception. Subtracting the same noise would leave
    rounding errors, so the values are kept in `backup`, one copy of the parameters
    for any number of directions.

    Args:
        params: The parameters, changed in place; their order determines the noise of each.
        seed: Determines the directions.
        member: The number of the direction.
        scale: The factor s sigma of the direction.
        directions: The source of the directions; None: Gaussian.
        backup: Tensors like `params` for the backup; None: allocated here.

    Raises:
        TypeError: One of `params` is not a floating-point or complex tensor.

    Example:
        >>> w = torch.zeros(2)
        >>> with perturbed([w], seed=0, member=3, scale=0.1):
        ...     inside = bool(w.any())
        >>> inside, w
        (True, tensor([0., 0.]))
    """
    source = Gaussian() if directions is None else directions
    with _kept(params, backup):
        with torch.no_grad():
            real = _real(params)
            for p, z in zip(real, source.leaves(real, seed, member)):
                p.add_(z, alpha=scale)
        forget_casts()
        yield


@contextmanager
def _kept(tensors: Sequence[Tensor], backup: Sequence[Tensor] | None = None) -> Iterator[None]:
    """Restore every bit of `tensors` on exit."""
    if backup is None:
        backup = [torch.empty_like(x, requires_grad=False) for x in tensors]
    with torch.no_grad():
        for x, b in zip(tensors, backup, strict=True):
            b.copy_(x)
    try:
        yield
    finally:
        with torch.no_grad():
            for x, b in zip(tensors, backup):
                x.copy_(b)
        forget_casts()


@uncompiled
def estimate(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    *,
    method: str | Estimator = "antithetic",
    num_samples: int = 1,
    sigma: float = 1e-3,
    seed: int | None = None,
    directions: Gaussian | Rademacher | None = None,
    scratch: Sequence[Tensor] = (),
) -> SeedGradient:
    """Return the estimated gradient of `closure()` with respect to `params`.

    The parameters are perturbed in place and restored bit for bit. The directions are those of
    `ZeroOrder(directions, ...)` for the same leaves and seed. Memory beyond the model is one copy
    of the parameters and one leaf of noise. Random draws inside the closure (dropout) are common to
    all evaluations.

    In half precision, a perturbation below the spacing of the numbers is lost. Keep sigma times z
    above 2**-8 (bfloat16) or 2**-11 (float16) of the weights, or keep the weights in float32. A
    sigma that is too small causes a warning.

    Args:
        closure: Evaluates the loss, 0-dim, with the current parameters.
        params: Different tensors that share no memory, such as `list(model.parameters())`.
        method: As in `torchopt.diff.zero_order.zero_order`.
        num_samples: N, the number of directions, >= 1.
        sigma: The size of the perturbation, > 0, in the units of the parameters.
        seed: Determines the directions; None: drawn from torch's generator.
        directions: A source with independent entries; None: Gaussian.
        scratch: Other tensors that the closure overwrites, which are restored after each
            evaluation. Buffers of modules, and tensors, numbers and random generators that a search
            of the closure finds, are restored anyway.

    Raises:
        ValueError: An option is out of its range, or two of `params` share memory.
        TypeError: The closure does not return a 0-dim real tensor, which may be an integer or a
            bool; or one of `params` is not a floating-point or complex tensor.

    References:
        S. Malladi, T. Gao, E. Nichani, A. Damian, J. Lee, D. Chen, S. Arora, Fine-Tuning Language
        Models with Just Forward Passes, NeurIPS 2023, https://arxiv.org/abs/2305.17333, which
        subtracts the noise again instead of keeping a copy, and so drifts by rounding.

    Example:
        >>> w = torch.tensor([1.0, -2.0], dtype=torch.float64)
        >>> g = estimate(lambda: (w * w).sum(), [w], num_samples=4000, seed=0)
        >>> g.add_to_([w], -0.5)  # w - 0.5 * 2 w = 0, up to the noise of the estimate
        >>> bool(w.norm() < 0.2)
        True
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples`: expected at least 1, got {num_samples}.")
    params = list(params)
    estimator = as_estimator(method)
    seed = draw_seed() if seed is None else seed
    options: dict[str, Any] = {
        "method": estimator,
        "sigma": sigma,
        "seed": seed,
        "directions": directions,
    }
    center = None
    if estimator.uses_center:
        with CallState(closure, (*params, *scratch)).held():
            center = _evaluate(closure, params, seed, scratch)
    rows = losses(closure, params, stop=num_samples, scratch=scratch, **options)
    return combine(rows, params, center=center, **options)


@uncompiled
@torch.no_grad()
def losses(
    closure: Callable[[], Tensor],
    params: Sequence[Tensor],
    *,
    seed: int,
    stop: int,
    start: int = 0,
    method: str | Estimator = "antithetic",
    sigma: float = 1e-3,
    directions: Gaussian | Rademacher | None = None,
    scratch: Sequence[Tensor] = (),
) -> Tensor:
    """Return the losses of directions `start` to `stop - 1`: one worker's share of `estimate`.

    Workers that hold the same parameters exchange only the seed and these numbers, from which
    `combine` computes the same gradient on each. The arguments are those of `estimate`.

    Returns:
        `[stop - start, K]`, one column for each offset of the estimator.

    Raises:
        TypeError: As for `estimate`.
        ValueError: As for `estimate`; or not 0 <= start < stop.

    Example:
        >>> losses(lambda: torch.tensor(3.0), [torch.zeros(2)], seed=0, start=4, stop=6)
        tensor([[3., 3.],
                [3., 3.]])
    """
    require_sigma(sigma)
    if not 0 <= start < stop:
        raise ValueError(f"`start`, `stop`: expected 0 <= start < stop, got {start} and {stop}.")
    _require_disjoint(params)
    estimator = as_estimator(method)
    normal = directions is None or directions.standard_normal
    warn_of_lost_perturbations(_real(params), sigma, normal, "number {} of `params`".format)
    backup = [torch.empty_like(p, requires_grad=False) for p in params]
    rows = []
    state = CallState(closure, (*params, *scratch))
    with state.held():
        for i in range(start, stop):
            row = []
            for s in estimator.offsets:
                state.reset()
                with perturbed(params, seed, i, s * sigma, directions, backup):
                    row.append(_evaluate(closure, params, seed, scratch))
            rows.append(torch.stack(row))
    return torch.stack(rows)


def combine(
    losses: Tensor,
    params: Sequence[Tensor],
    *,
    seed: int,
    method: str | Estimator = "antithetic",
    sigma: float = 1e-3,
    directions: Gaussian | Rademacher | None = None,
    center: Tensor | None = None,
) -> SeedGradient:
    """Return the gradient from the losses of all directions, `[N, K]`; see `losses`.

    Raises:
        ValueError: `losses` is not `[N, K]`, or `center`, the loss at the point, is missing.

    Example:
        >>> w = torch.tensor([1.0, 2.0])
        >>> def share(start):
        ...     return losses(lambda: (w**2).sum(), [w], seed=0, start=start, stop=start + 50)
        >>> gradient = combine(torch.cat([share(0), share(50)]), [w], seed=0)
        >>> gradient.add_to_([w], -0.1)  # a step of SGD
        >>> (w**2).sum().item() < 5
        True
    """
    estimator = as_estimator(method)
    source = Gaussian() if directions is None else directions
    if losses.ndim != 2 or losses.shape[1] != len(estimator.offsets):
        raise ValueError(
            f"`losses`: expected shape [N, {len(estimator.offsets)}] (directions, offsets "
            f"{estimator.offsets}), got {list(losses.shape)}."
        )
    if estimator.uses_center and center is None:
        raise ValueError(f"{estimator.name}: expected center, the loss at theta, got None.")
    losses = widened(losses)
    center = None if center is None else widened(center)
    norms = losses.new_zeros(len(losses) if estimator.uses_norms else 0)
    real = _real(params)
    for i in range(len(norms)):
        for z in source.leaves(real, seed, i):
            norms[i] += z.to(accumulator(z.dtype)).square().sum().to(norms)
    c = estimator.coefficients(Evaluations(losses, center, norms, sigma))
    count = losses.numel() + int(estimator.uses_center)
    return SeedGradient(seed, c, source, estimator, count)


@torch.no_grad()
def _evaluate(
    closure: Callable[[], Tensor], params: Sequence[Tensor], seed: int, scratch: Sequence[Tensor]
) -> Tensor:
    with _kept(scratch), common_draws(seed ^ 0x5DEECE66D, params):
        loss = closure()
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"`closure`: expected a 0-dim tensor, got {got}.")
    return widened(loss.detach()).clone()


def _require_disjoint(params: Sequence[Tensor]) -> None:
    if len({id(p) for p in params}) != len(params):
        raise ValueError("`params`: expected different tensors, got one of them twice.")
    spans = []
    for k, p in enumerate(params):
        if p.numel():
            last = sum((n - 1) * step for n, step in zip(p.shape, p.stride()))
            begin = p.data_ptr()
            spans.append((str(p.device), begin, begin + (last + 1) * p.element_size(), k))
    spans.sort()
    for (device, _, end, k), (other, begin, _, j) in zip(spans, spans[1:]):
        if device == other and begin < end:
            raise ValueError(
                f"`params`: expected tensors that share no memory, but numbers {min(j, k)} and "
                f"{max(j, k)} do. Pass one of them."
            )
