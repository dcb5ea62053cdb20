# SPDX-License-Identifier: Apache-2.0
r"""Products with second derivatives from first derivatives alone.

For a direction v with the unit vector u = v / |v|, and a length h,

    H v = |v| (g(theta + h u) - g(theta - h u)) / (2 h) + O(h^2),

where g is the gradient with respect to the parameters and to all other inputs of the loss, so that
it also gives the mixed second derivatives. Four gradients, at h and 2 h, cancel the term of order
h^2 (Richardson extrapolation):

    (4 D(h) - D(2 h)) / 3 = H v + O(h^4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.errors import GradientMismatchError, NotDifferentiableError
from torchopt.tree import is_smooth

__all__ = ["Differences", "Judge", "Product"]

# Maps parameters and the weight of each loss to the weighted sum of the losses and its gradient.
Gradient = Callable[[list[Any], Tensor], tuple[Tensor, Sequence[Tensor | None]]]
ROUNDINGS = 1e3  # how many rounding errors may add up in a loss


class Product(NamedTuple):
    """A product with second derivatives, and an estimate of the norm of its error.

    `apart` is the distance between the slope of the losses and the slope that their gradient gives,
    relative to the largest distance that rounding and the formula explain.
    """

    value: list[Tensor | None]
    error: Tensor
    apart: Tensor


@dataclass(frozen=True)
class Differences:
    """Products with second derivatives from differences of gradients, for `derivative=`.

    Use them for losses with operations that have no second derivative: fused attention, functions
    marked `once_differentiable`, third-party kernels. They need the memory of one gradient. The
    gradient of the loss must be smooth along the displacement. A kink, such as that of ReLU, causes
    an error, which the estimate below shows.

    The length of the displacement is h = eps^p (1 + |theta|), with the largest eps of the
    parameters and p = 1/3 for two gradients, 1/5 for four. Then the errors of the formula (h^2,
    h^4) and of rounding (eps / h) are about the same: relative errors of about 1e-10 and 1e-12 in
    float64, 1e-4 and 1e-5 in float32.

    The error of each product is estimated. For two gradients the estimate is the difference between
    their mean and the gradient in the middle. For four it combines the distance from the formula
    with two gradients and the growth of that difference from h to 2 h. The estimate is of lower
    order in h than the error, so it is the larger of the two if the gradient is smooth and h is
    small. `report.differences` of the inner loop gets the largest estimate of each backward pass,
    relative to the cotangent that the product is a part of.

    The gradient in the middle is known only for the parameters. So a kink close to the middle that
    affects only the mixed second derivatives is not noticed. Two gradients also miss a jump in the
    middle, such as that of the gradient of |theta| at 0, which looks like a curvature of
    1 / h; use four for such a loss.

    The values of the loss show whether its gradient is its derivative. If a loss detaches something
    that depends on the parameters, a difference would differentiate it, and `backward()` raises.

    Attributes:
        gradients: How many gradients a product takes, 2 or 4.
        step: h / (1 + |theta|), > 0, dimensionless; None: chosen by the dtype.
        limit: The largest relative error; above it `backward()` raises. None: no limit. The
            default 0.1 is also what `Verify` allows between two engines: a smaller error is lost in
            the noise of minibatches, a larger one begins to change the direction.

    Raises:
        GradientMismatchError: In `backward()`: the estimate exceeds `limit`.
        NotDifferentiableError: In `backward()`: the gradient of the loss is not its derivative, or
            the parameters have fewer digits than float32.
        ValueError: `gradients`, `step` or `limit` is out of its range.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff import Differences
        >>> inner = torchopt.inner_loop(
        ...     lambda w, x: ((w - x) ** 4).sum(), torchopt.sgd(0.1), steps=1,
        ...     derivative=Differences(gradients=2),
        ... )
        >>> w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        >>> (g,) = torch.autograd.grad(inner(w, torch.ones(1)).params.sum(), w)
        >>> torch.testing.assert_close(g, 1 - 1.2 * torch.ones(1, dtype=torch.float64))
        >>> inner.report.differences[-1] < 1e-4
        True

    References:
        H. Liu, K. Simonyan, Y. Yang, DARTS: Differentiable Architecture Search, ICLR 2019,
        https://arxiv.org/abs/1806.09055, equation 8 (two gradients; its length is 0.01)

        W. H. Press et al., Numerical Recipes, 3rd edition, 2007, section 5.7 (the step)
    """

    gradients: int = 4
    step: float | None = None
    limit: float | None = 0.1

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.gradients not in (2, 4):
            raise ValueError(f"Differences: gradients: expected 2 or 4, got {self.gradients}.")
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"Differences: step: expected a number > 0 or None, got {self.step}.")
        if self.limit is not None and not self.limit >= 0:
            raise ValueError(
                f"Differences: limit: expected a number >= 0 or None, got {self.limit}."
            )

    def length(self, dtype: torch.dtype) -> float:
        """Return h / (1 + |theta|).

        Raises:
            NotDifferentiableError: The dtype has too few digits for differences.
        """
        if self.step is not None:
            return self.step
        eps = torch.finfo(dtype).eps
        if eps > 1e-4:
            raise NotDifferentiableError(
                f"derivative='differences': expected parameters in float32 or float64, got "
                f"{dtype}, which leaves no digits in differences of gradients. Use float32."
            )
        return float(eps ** (1 / 3 if self.gradients == 2 else 1 / 5))

    def product(
        self,
        gradient: Gradient,
        at: Sequence[Any],
        direction: Sequence[Tensor | None],
        center: Sequence[Tensor | None],
        tasks: int | None = None,
    ) -> Product:
        """Return d/de of the gradient at `at + e * direction`, at e = 0.

        Args:
            gradient: Called `gradients` times with parameters and weights (0-dim or `[tasks]`). The
                gradients for the floating-point tensors of `at` come first in its result.
            at: The parameters; with tasks, each tensor has a leading dimension of tasks.
            direction: Tensors like the parameters; None for zero.
            center: The gradient at `at` with respect to the parameters.
            tasks: The number of tasks; None for one task without a dimension of its own.
        """
        where = [i for i, d in enumerate(direction) if d is not None]
        along = [d for d in direction if d is not None]
        size = _norms(along, tasks)
        moved = [at[i].detach() for i in where]
        relative = max(self.length(x.dtype) for x in moved)  # for the fewest digits
        length = relative * (1 + _norms(moved, tasks))
        units = [_scaled(d, torch.where(size > 0, 1 / size, 0)) for d in along]

        def ends(factor: int) -> tuple[tuple[Tensor, Sequence[Tensor | None]], ...]:
            """Return losses and gradients on both sides, each divided by their distance."""
            weight = size / (2 * factor * length)
            found = []
            for sign in (factor, -factor):
                params = list(at)
                with torch.enable_grad():
                    for i, u in zip(where, units):
                        params[i] = at[i] + _scaled(u, sign * length)
                found.append(gradient(params, weight))
            return tuple(found)

        (above, ahead), (below, behind) = ends(1)
        near = _difference(ahead, behind)
        both = _sum(ahead, behind)
        # Gradients leave out what has none, such as integers among the parameters.
        moving = [d is not None for x, d in zip(at, direction) if is_smooth(x)]
        middle = [g for g, moves in zip(center, moving) if moves]
        # The even part vanishes like h if the gradient is smooth, and does not vanish at a kink.
        even = _difference(both, [None if g is None else _scaled(g, size / length) for g in center])
        value, error = near, norm(even)
        if self.gradients == 4:
            (_, ahead), (_, behind) = ends(2)
            value = [
                None if a is None or b is None else (4 * a - b) / 3
                for a, b in zip(near, _difference(ahead, behind))
            ]
            twice = [None if g is None else _scaled(g, size / (2 * length)) for g in center]
            # What remains is of order h^3 if the gradient is smooth, half of the bend at a kink.
            bend = [
                None if a is None or b is None else a - 2 * b
                for a, b in zip(_difference(_sum(ahead, behind), twice), even)
            ]
            error = norm([*_difference(value, near), *bend])
        apart = _apart(
            (above, below),
            _slope(middle, along),
            norm([_scaled(u, length) for u in units]) * torch.maximum(error, norm(even)),
            norm(middle) * norm(along),
            (size / length).sum(),
        )
        return Product(value, error, apart)


class Judge:
    """Collects the errors of the products of one backward pass.

    Args:
        differences: The settings of the products.
        report: Its list `differences` gets the largest relative error.
    """

    def __init__(self, differences: Differences, report: Any) -> None:
        self.differences, self._report = differences, report
        self._errors: list[Tensor] = []
        self._apart: list[Tensor] = []

    def again(self) -> Judge:
        """Return a judge for products that belong to no backward pass."""
        return Judge(self.differences, None)

    def note(self, product: Product, whole: Sequence[Tensor | None]) -> None:
        """Record the errors of a product that is a part of the cotangents `whole`."""
        size, error = norm(whole), product.error
        self._errors.append(torch.where(error > 0, error / size, error).detach())
        self._apart.append(product.apart.detach())

    def settle(self) -> None:
        """Report the largest error.

        Raises:
            GradientMismatchError: It is above the limit.
            NotDifferentiableError: A gradient was not the derivative of its loss.
        """
        if not self._errors:
            return
        worst, limit = float(torch.stack(self._errors).max()), self.differences.limit
        apart = float(torch.stack(self._apart).max())
        self._errors, self._apart = [], []
        self._report.differences.append(worst)
        if limit is not None and not worst <= limit:
            raise GradientMismatchError(
                f"derivative='differences': expected products with second derivatives within "
                f"{limit} of the cotangents they belong to, got an estimated error of {worst:.2g}. "
                "A loss with kinks, low precision or noise does this: use float64, "
                "Differences(step=...) or 'mixed', or Differences(limit=None) to accept it."
            )
        if apart > 1:  # never for NaN
            raise NotDifferentiableError(
                "derivative='differences': expected a loss whose gradient is its derivative, got "
                "one whose slope differs. A loss that detaches a value, or changes a gradient in "
                "its backward pass, does this. Pass the value as an argument, or use 'reverse', "
                "'mixed' or 'first_order'."
            )


def _apart(
    ends: tuple[Tensor, Tensor], middle: Tensor, bend: Tensor, scale: Tensor, per_length: Tensor
) -> Tensor:
    """Return |slope of the loss - slope from its gradient| relative to the allowed distance.

    The slope of the loss misses a term of order h^2. The slope from the mean gradient of both sides
    misses three times that term, which is no larger than the even part of the gradient. Kinks on
    both sides cancel in a slope, so the bound is the norm of the gradient, not a slope.

    Args:
        ends: The losses on both sides, divided by the distance between the sides.
        middle: The slope from the gradient in the middle.
        bend: The norm of the even part of the gradient, or of its error, times the displacement.
        scale: The norm of the gradient times the norm of the direction.
        per_length: The norm of the direction divided by h.
    """
    above, below = (x.detach().double() for x in ends)
    eps = torch.finfo(ends[0].dtype).eps
    rounding = ROUNDINGS * eps * (above.abs() + below.abs() + per_length)
    allowed = 3 * bend + eps ** (1 / 3) * scale + rounding
    distance = (above - below - middle).abs()
    return torch.where(distance > 0, distance / allowed, distance)


def _slope(grads: Iterable[Tensor | None], directions: Sequence[Tensor]) -> Tensor:
    products = [
        torch.vdot(g.reshape(-1), d.reshape(-1).to(g.dtype)).real.double()
        for g, d in zip(grads, directions)
        if g is not None
    ]
    return torch.stack(products).sum() if products else torch.zeros((), dtype=torch.float64)


def _difference(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None]
) -> list[Tensor | None]:
    return [None if a is None or b is None else a - b for a, b in zip(first, second)]


def _sum(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if a is None or b is None else a + b for a, b in zip(first, second)]


def _norms(tensors: Sequence[Tensor], tasks: int | None) -> Tensor:
    """Return the norm of several tensors together; with tasks, one norm for each, `[tasks]`."""
    if tasks is None:
        return norm(tensors)
    each = [torch.linalg.vector_norm(x.reshape(tasks, -1), dim=1) for x in tensors]
    found: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return found


def norm(tensors: Sequence[Tensor | None]) -> Tensor:
    """Return the norm of several tensors together, in float64; None counts as zero."""
    every = [torch.linalg.vector_norm(x).double() for x in tensors if x is not None]
    if not every:
        return torch.zeros((), dtype=torch.float64)
    found: Tensor = torch.linalg.vector_norm(torch.stack(every))
    return found


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    factor = factor.to(x.real.dtype)
    return x * factor.reshape((*factor.shape, *[1] * (x.ndim - factor.ndim)))
