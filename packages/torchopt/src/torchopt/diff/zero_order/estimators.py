# SPDX-License-Identifier: Apache-2.0
"""Estimators: pure functions that compute a gradient from losses and noise.

With directions z_i of mean 0 and covariance I, and losses f(theta + s sigma z_i) at the offsets s
of the estimator, the estimators here are linear in the directions:

    g = 1/N sum_i c_i d(z_i),      d(z) = z  (SPSA: d(z) = 1/z elementwise),

so the coefficients c can be computed first and the noise regenerated afterwards. All estimators
except those with shaped losses are unbiased for the gradient of a linear function. In the table,
`f_i` is f(theta + sigma z_i), `f_-i` is f(theta - sigma z_i), and `f_0` is f(theta):

| estimator | c_i | bias for the gradient of f |
|---|---|---|
| `naive` | f_i / sigma | O(sigma^2) |
| `forward` | (f_i - f_0) / sigma | O(sigma^2) if odd moments vanish; one difference: O(sigma) |
| `antithetic`, `central` | (f_i - f_-i) / (2 sigma) | O(sigma^2) |
| `spsa` | as antithetic, d(z) = 1/z | O(sigma^2) |
| `multi_point(m)` | central stencil of 2m points | O(sigma^2m) |
| `leave_one_out` | (f_i - mean of the other f_j) / sigma | as naive |
| `optimal_baseline` | (f_i - mean of the other f_j weighted by norm(z_j)^2) / sigma | as naive |
| `shaped(e, u)` | those of e for the utilities u(losses) | another objective |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

import torch
from torch import Tensor

from torchopt.diff.zero_order.error_bars import GradientEstimate, Spread, effective_sample_size
from torchopt.diff.zero_order.precision import accumulator, widened
from torchopt.diff.zero_order.surrogate import control_variate, require_linear
from torchopt.diff.zero_order.utilities import centered_ranks, nes_utilities, z_scores
from torchopt.shown import Described

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "antithetic",
    "as_estimator",
    "centered_ranks",
    "central",
    "control_variate",
    "forward",
    "identity",
    "leave_one_out",
    "multi_point",
    "naive",
    "nes_utilities",
    "optimal_baseline",
    "require_linear",
    "shaped",
    "spsa",
    "z_scores",
]


@dataclass(frozen=True)
class Evaluations:
    """The values that coefficients may depend on.

    Attributes:
        losses: `[N, K]`; row i has the losses at theta + s sigma z_i for the K offsets s.
        center: f(theta), 0-dim; None unless the estimator uses it.
        square_norms: norm(z_i)^2, `[N]`.
        sigma: The size of the perturbation.
        coupled: How many consecutive directions depend on one another.
    """

    losses: Tensor
    center: Tensor | None
    square_norms: Tensor
    sigma: float
    coupled: int = 1


def identity(z: Tensor) -> Tensor:
    """Return directions unchanged: the usual `dual`."""
    return z


@dataclass(frozen=True)
class Estimator(Described):
    """A zero-order gradient estimator.

    Attributes:
        name: The name, as in the table of this module.
        offsets: The offsets s of the evaluations at theta + s sigma z.
        coefficients: Computes c, `[N]`, from the evaluations.
        uses_center: Whether f(theta) is needed, which takes one more evaluation.
        dual: The function d, from directions to directions.
        local: Whether c_i depends only on row i of the losses (and on f(theta)). Then one pass over
            the directions is enough.
        uses_norms: Whether c depends on the norms of the directions, which take a pass over them.
        curvature: Computes h, `[N]`, from evaluations that include f(theta), such that the mean of
            h_i (z_i z_i' - I) estimates the Hessian if z is standard normal. None: the estimator
            has no second derivative.
        linear: Whether c is linear in the losses. Only then may a linear function be subtracted
            from the losses and its gradient added again (`control_variate`).

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> f = lambda x: 3 * x[..., 0] - 2 * x[..., 1] + 10
        >>> losses = torch.stack([f(0.1 * z), f(-0.1 * z)], dim=1)
        >>> (2 * antithetic(losses, z, 0.1)).round(decimals=3)
        tensor([ 3., -2.])
    """

    name: str
    offsets: tuple[float, ...]
    coefficients: Callable[[Evaluations], Tensor]
    uses_center: bool = False
    dual: Callable[[Tensor], Tensor] = identity
    local: bool = False
    uses_norms: bool = True
    curvature: Callable[[Evaluations], Tensor] | None = None
    linear: bool = True

    def __call__(
        self, losses: Tensor, noise: Tensor, sigma: float, center: Tensor | None = None
    ) -> Tensor:
        """Return the gradient, summed in float32 or wider.

        Args:
            losses: `[N, K]`, or `[N]` if there is one offset; integers and bools are allowed.
            noise: The directions z, `[N, *shape]`.
            sigma: The size of the perturbation, > 0.
            center: f(theta), 0-dim, for the estimators that use it.

        Returns:
            `[*shape]`, a new tensor.

        Raises:
            ValueError: The shapes do not match, or `center` is missing.
        """
        c = self._weights(losses, noise, sigma, center, 1)
        total = torch.tensordot(c, self.dual(noise.to(c.dtype)), dims=1)
        mean: Tensor = total / len(noise)
        return mean.to(noise.dtype)

    def estimate(
        self,
        losses: Tensor,
        noise: Tensor,
        sigma: float,
        center: Tensor | None = None,
        *,
        coupled: int = 1,
    ) -> GradientEstimate:
        """Return the gradient with its error bars; arguments as in `__call__`.

        Args:
            losses: `[N, K]`, or `[N]` if there is one offset.
            noise: The directions, `[N, *shape]`.
            sigma: The size of the perturbation, > 0.
            center: f(theta), 0-dim, for the estimators that use it.
            coupled: How many consecutive directions depend on one another.
        """
        c = self._weights(losses, noise, sigma, center, coupled)
        n, directions = len(noise), self.dual(noise.to(c.dtype))
        mean = torch.tensordot(c, directions, dims=1) / n
        spread = Spread([mean], coupled, n)
        spread.add(0, c, directions)
        error = spread.standard_error([mean])
        return GradientEstimate(
            mean.to(noise.dtype),
            None if error is None else error[0].to(noise.dtype),
            effective_sample_size(c),
            n * len(self.offsets) + int(self.uses_center),
        )

    def _weights(
        self, losses: Tensor, noise: Tensor, sigma: float, center: Tensor | None, coupled: int
    ) -> Tensor:
        losses = widened(losses.reshape(len(losses), -1))
        if losses.shape != (len(noise), len(self.offsets)):
            raise ValueError(
                f"{self.name}: expected losses of shape [{len(noise)}, {len(self.offsets)}] "
                f"(directions, offsets {self.offsets}), got {list(losses.shape)}."
            )
        if self.uses_center and center is None:
            raise ValueError(f"{self.name}: expected center, the loss at theta, got None.")
        dtype = accumulator(noise.dtype)
        square_norms = noise.reshape(len(noise), noise[0].numel()).to(dtype).square().sum(1)
        middle = None if center is None else widened(center)
        evaluations = Evaluations(losses, middle, square_norms, sigma, coupled)
        return self.coefficients(evaluations).to(dtype)


def _naive(e: Evaluations) -> Tensor:
    return e.losses[:, 0] / e.sigma


def _forward(e: Evaluations) -> Tensor:
    assert e.center is not None
    return (e.losses[:, 0] - e.center) / e.sigma


def _central(e: Evaluations) -> Tensor:
    return (e.losses[:, 0] - e.losses[:, 1]) / (2.0 * e.sigma)


def _leave_one_out(e: Evaluations) -> Tensor:
    return _against_others(e, torch.ones_like(e.losses[:, 0]))


def _optimal_baseline(e: Evaluations) -> Tensor:
    return _against_others(e, e.square_norms)


def _against_others(e: Evaluations, weights: Tensor) -> Tensor:
    f = e.losses[:, 0]
    n, size = len(f), e.coupled
    if n <= size:
        raise ValueError(
            f"a leave-one-out baseline: expected num_samples of at least {size + 1}, got {n}: "
            "there is no independent sample to average."
        )
    # f_i minus the weighted mean of the f_j whose directions are independent of z_i, those of other
    # blocks; a dependent one would make the estimate biased. Deviations from the mean are used,
    # because they lose no digits to a large common offset.
    weights = weights.to(f.dtype)
    deviation = f - f.mean()
    own_weight, own = weights, weights * deviation
    if size > 1:
        blocks = torch.arange(n, device=f.device) // size
        own_weight, own = (
            torch.zeros_like(f).index_add(0, blocks, x)[blocks] for x in (own_weight, own)
        )
    rest = weights.sum() - own_weight
    others = ((weights * deviation).sum() - own) / torch.where(
        rest == 0, torch.ones_like(rest), rest
    )
    return (deviation - others) / e.sigma


def _second_one_sided(e: Evaluations) -> Tensor:
    assert e.center is not None
    return (e.losses[:, 0] - e.center) / e.sigma**2


def _second_naive(e: Evaluations) -> Tensor:
    return e.losses[:, 0] / e.sigma**2


def _second_baseline(e: Evaluations) -> Tensor:
    return _leave_one_out(e) / e.sigma


def _second_central(e: Evaluations) -> Tensor:
    assert e.center is not None
    return (e.losses.sum(1) - 2.0 * e.center) / (2.0 * e.sigma**2)


# The second coefficients follow from Stein's identity for F(theta) = E f(theta + sigma z) with
# standard normal z, sigma^2 Hessian F = E f(theta + sigma z) (z z' - I), and from E (z z' - I) = 0.
naive = Estimator("naive", (1.0,), _naive, local=True, uses_norms=False, curvature=_second_naive)
forward = Estimator(
    "forward", (1.0,), _forward, uses_center=True, local=True, uses_norms=False,
    curvature=_second_one_sided,
)  # fmt: skip
antithetic = Estimator(
    "antithetic", (1.0, -1.0), _central, local=True, uses_norms=False, curvature=_second_central
)
central = replace(antithetic, name="central")
# J. Spall, Multivariate stochastic approximation using a simultaneous perturbation gradient
# approximation, IEEE Trans. Automatic Control 37, 1992. For Rademacher directions it equals
# `antithetic`. If 1/z has no finite variance, as for Gaussian directions, neither has the estimate.
spsa = Estimator("spsa", (1.0, -1.0), _central, dual=torch.reciprocal, local=True, uses_norms=False)
# W. Kool, H. van Hoof, M. Welling, Buy 4 REINFORCE samples, get a baseline for free!, 2019.
leave_one_out = Estimator(
    "leave_one_out", (1.0,), _leave_one_out, uses_norms=False, curvature=_second_baseline
)
# E. Greensmith, P. Bartlett, J. Baxter, Variance reduction techniques for gradient estimates in
# reinforcement learning, JMLR 5, 2004: the constant b that minimises E norm((f - b) z)^2 is
# E[f norm(z)^2] / E[norm(z)^2].
optimal_baseline = Estimator("optimal_baseline", (1.0,), _optimal_baseline)

ESTIMATORS = {
    e.name: e for e in (naive, forward, antithetic, central, spsa, leave_one_out, optimal_baseline)
}


@dataclass(frozen=True)
class _Stencil:
    weights: tuple[float, ...]

    def __call__(self, e: Evaluations) -> Tensor:
        weights = torch.tensor(self.weights, dtype=e.losses.dtype, device=e.losses.device)
        # Not a matrix product, which autocast would round: the terms cancel.
        return (e.losses * weights).sum(1) / e.sigma


def multi_point(pairs: int) -> Estimator:
    """Return the central difference of `2 * pairs` points along each direction.

    The offsets are s = 1, -1, 2, -2, ..., m, -m, with the weights of the symmetric stencil,

        w_s = (-1)^(s+1) (m!)^2 / (s (m - s)! (m + s)!),   w_-s = -w_s,

    which is exact for polynomials of degree 2m along a line, so the bias is O(sigma^2m).

    Args:
        pairs: m, the number of pairs, >= 1; 1 is `central`.

    Raises:
        ValueError: `pairs` is less than 1.

    Example:
        >>> [round(12 * w) for w in multi_point(2).coefficients.weights]
        [8, -8, -1, 1]
    """
    if pairs < 1:
        raise ValueError(f"multi_point: expected pairs of at least 1, got {pairs}.")
    offsets: list[float] = []
    weights: list[float] = []
    for s in range(1, pairs + 1):
        # w_s = 1/(2s) * product over j != s of j^2 / (j^2 - s^2)
        w = Fraction(1, 2 * s) * prod(
            (Fraction(j * j, j * j - s * s) for j in range(1, pairs + 1) if j != s),
            start=Fraction(1),
        )
        offsets += [float(s), -float(s)]
        weights += [float(w), -float(w)]
    return Estimator(
        f"multi_point({pairs})",
        tuple(offsets),
        _Stencil(tuple(weights)),
        local=True,
        uses_norms=False,
    )


def as_estimator(method: str | Estimator) -> Estimator:
    """Return the estimator named `method`, or `method` itself if it is one.

    Raises:
        ValueError: There is no estimator of this name.
    """
    if isinstance(method, Estimator):
        return method
    if method not in ESTIMATORS:
        raise ValueError(
            f"`method`: expected one of {', '.join(map(repr, ESTIMATORS))} or an `Estimator`, "
            f"got {method!r}."
        )
    return ESTIMATORS[method]


# --- shaping --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shaped:
    inner: Estimator
    utility: Callable[[Tensor], Tensor]

    def __call__(self, e: Evaluations) -> Tensor:
        utilities = self.utility(e.losses)
        return self.inner.coefficients(replace(e, losses=utilities, center=None))


def shaped(estimator: Estimator, utility: Callable[[Tensor], Tensor] = centered_ranks) -> Estimator:
    """Return `estimator` applied to the utilities of all losses instead of the losses.

    With ranks as utilities, the direction depends only on the order of the losses, so outliers and
    monotone transformations of the loss have no effect. The result is not a gradient of the loss.

    Args:
        estimator: An estimator that does not use f(theta).
        utility: Maps losses `[N, K]` to utilities of the same shape, small for small losses.

    Raises:
        ValueError: The estimator uses f(theta).

    Example:
        >>> z = torch.tensor([[1.0], [-1.0]])
        >>> shaped(naive)(torch.tensor([5.0, 500.0]), z, 1.0)  # the ranks are -1/2 and 1/2
        tensor([-0.5000])
    """
    if estimator.uses_center:
        raise ValueError(
            f"shaped: expected an estimator that does not use the loss at theta, got "
            f"{estimator.name}. Use naive or antithetic."
        )
    name = f"shaped({estimator.name}, {getattr(utility, '__name__', repr(utility))})"
    return Estimator(
        name,
        estimator.offsets,
        _Shaped(estimator, utility),
        dual=estimator.dual,
        uses_norms=estimator.uses_norms,
        linear=False,
    )
