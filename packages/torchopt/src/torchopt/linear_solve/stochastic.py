# SPDX-License-Identifier: Apache-2.0
r"""Solvers for random products: A = E[Â], of which each product sees another draw Â.

An operator that draws random numbers, as a minibatch, is bound again for each product. With
independent draws the expectation of a product of them is the product of expectations, so both
solvers are, in the mean, deterministic ones: that says how large their bias is. Second moments
E[x xᵀ] obey linear recursions, which are stated with each solver; the covariance is what is left of
them without the product of means.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.linear_solve.iterate import norm, unit, wide, widened
from torchopt.linear_solve.operator import BoundOperator
from torchopt.linear_solve.result import OnFail, Status
from torchopt.linear_solve.solver import Computed, Solver
from torchopt.tree_function import max_over_batch

__all__ = ["StochasticGradient", "StochasticNeumann"]


@dataclass(frozen=True)
class _Stochastic(Solver):
    """What the two have in common.

    Attributes:
        steps: How many random products are taken, one more for what is reported.
        alpha: The step size α.
        ridge: Solve with A + ridge I.
        on_fail: What to do when more than `rtol` of ‖b‖ is left: "raise", "warn" or "ignore".
        rtol: The part of ‖b‖ that may be left.
    """

    steps: int = 100
    alpha: float | Tensor = 1.0
    ridge: float | Tensor | None = None
    on_fail: OnFail = "warn"
    rtol: float = 0.5

    def __post_init__(self) -> None:
        """Check the options."""
        name = type(self).__name__
        _require_count(name, "steps", self.steps, "a count >= 1")
        if not self.rtol >= 0:
            raise ValueError(f"{name}: rtol: expected a number >= 0, got {self.rtol}.")
        if not isinstance(self.alpha, Tensor) and not 0 < abs(self.alpha) < math.inf:
            raise ValueError(f"{name}: alpha: expected a finite step size, got {self.alpha}.")

    @abstractmethod
    def run(self, operator: BoundOperator, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the solution and the norm of what is left of b."""

    def init(self, operator: BoundOperator, like: Tensor) -> tuple[BoundOperator, float]:
        """Return the operator, and the rounding of its dtype."""
        return widened(operator, like), float(torch.finfo(like.dtype).eps)

    def compute(
        self, state: tuple[BoundOperator, float], b: Tensor, x0: Tensor | None = None
    ) -> Computed:
        """Return a random solution for one vector b."""
        (operator, eps), dtype, b = state, b.dtype, wide(b)
        scale = unit(b)
        b = b / scale
        start = None if x0 is None else x0.to(b.dtype) / scale
        x, left = self.run(operator, b, start)
        size = norm(b)
        met = left <= max(self.rtol, 10 * eps) * size
        status = torch.where(met, int(Status.CONVERGED), int(Status.MAX_ITERATIONS))
        status = torch.where(left > 10 * size, int(Status.DIVERGED), status)
        finite = left.isfinite() & x.isfinite().all()
        status = torch.where(finite, status, int(Status.NON_FINITE))
        count = torch.full_like(status, self.steps)
        return Computed((x * scale).to(dtype), count, left * scale, status)

    def transpose(self, state: tuple[BoundOperator, float]) -> tuple[BoundOperator, float]:
        """Return Aᴴ."""
        return state[0].T, state[1]

    @property
    def failure(self) -> OnFail:
        """What `solver(matvec, b)` does with an answer that is far off."""
        return self.on_fail

    @property
    def is_stochastic(self) -> bool:
        """Yes."""
        return True

    @property
    def shift(self) -> float | Tensor | None:
        """The ridge."""
        return self.ridge


def _require_count(
    solver: str, name: str, count: Any, expected: str, most: float = math.inf
) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ValueError(f"{solver}: {name}: expected {expected}, got {count!r}.")


@dataclass(frozen=True)
class StochasticGradient(_Stochastic):
    r"""Stochastic gradient descent, or fixed-point iteration, on A x = b with random products.

    x_{k+1} = x_k - α_k (Â_k x_k - b), α_k = α / (1 + decay k), from zero. For a fixed point, whose
    operator is ∂T/∂x - 1, α = -1 is the iteration x ← T̂(x) of the reference.

    Bias: E[x_K] - x* = Π_k (I - α_k A) (x_0 - x*), that of the same steps with A itself. It
    vanishes with K if the spectral radius of I - α_k A is below 1.

    Variance: with R_k = I - α_k Â_k, μ_k = E[x_k] and M_k = E[x_k x_kᵀ],

        M_{k+1} = E[R_k M_k R_kᵀ] + α_k (E[R_k] μ_k bᵀ + b μ_kᵀ E[R_k]ᵀ) + α_k² b bᵀ.

    For noise E‖(Â - A) x‖² ≤ σ² ‖x‖² and ‖I - α A‖ ≤ q, the trace of the covariance is at most
    α² σ² max_k E‖x_k‖² / (1 - q²): a constant α leaves a variance of the order α, a decaying one
    none. The mean of the last iterates has less of it than the last one.

    The derivatives of a solve are solves with draws of their own. The residual that is reported is
    the mean of b - Â_k x_k over the iterates that are averaged, or over the second half of the
    steps: it is that of the mean iterate, and noise.

    Attributes:
        steps: How many steps, each with one random product.
        alpha: The first step size.
        ridge: Solve with A + ridge I.
        on_fail: What to do when more than `rtol` of ‖b‖ is left: "raise", "warn" or "ignore".
        rtol: The part of ‖b‖ that may be left, noise included.
        decay: How fast the step size falls, >= 0.
        average: The number of last iterates whose mean is returned.

    Raises:
        ValueError: A count below 1, a decay below 0, a mean over more iterates than there are.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LinearOperator, StochasticGradient, linear_solve
        >>> _ = torch.manual_seed(0)
        >>> rows = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [2.0, -2.0]])
        >>> def product(rows, v):  # of one row, whose mean is rows.T @ rows / 4
        ...     row = rows[torch.randint(4, (1,))]
        ...     return row.T @ (row @ v)
        >>> A = LinearOperator.from_function(product, rows, torch.ones(2), ["positive_definite"])
        >>> solver = StochasticGradient(4000, alpha=0.1, decay=0.01, average=2000)
        >>> x = linear_solve(A, torch.tensor([4.5, 1.5]), solver).value
        >>> torch.allclose(x, torch.tensor([1.0, 0.0]), atol=0.1)
        True

    References:
        R. Grazzi, M. Pontil, S. Salzo, Convergence Properties of Stochastic Hypergradients,
        AISTATS 2021, https://arxiv.org/abs/2011.07122

        R. Grazzi, M. Pontil, S. Salzo, Bilevel Optimization with a Lower-level Contraction:
        Optimal Sample Complexity without Warm-start, JMLR 24, 2023,
        https://arxiv.org/abs/2202.03397 (the step sizes)
    """

    decay: float = 0.0
    average: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not 0 <= self.decay < math.inf:
            raise ValueError(
                f"StochasticGradient: decay: expected a number >= 0, got {self.decay}."
            )
        expected = f"a count of iterates from 1 to steps={self.steps}"
        _require_count("StochasticGradient", "average", self.average, expected, self.steps)

    def run(self, operator: BoundOperator, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean of the last iterates and the norm of the mean residual."""
        x = torch.zeros_like(b) if x0 is None else x0
        total, left, looked = torch.zeros_like(b), torch.zeros_like(b), 0
        first = min(self.steps // 2, self.steps - self.average)
        for k in range(self.steps):
            residual = b - operator.fresh().mv(x)
            if k >= first:
                left, looked = left + residual, looked + 1
            x = x + self.alpha / (1 + self.decay * k) * residual
            if k >= self.steps - self.average:
                total = total + x
        return total / self.average, norm(left / looked)


@dataclass(frozen=True)
class StochasticNeumann(_Stochastic):
    r"""The Neumann series with random products: x = Σ_k α Π_{j=1}^{k} (I - α Â_j) b.

    Each product has a draw of its own. With `going_on`, a probability p, the series is cut off at
    random: after each term it goes on with probability p, and what follows is divided by p.

    Bias: that of the truncated series, -(I - αA)^(steps + 1) x*, with `going_on` too.

    Variance: with R = I - αÂ, X_0 = b bᵀ and X_{k+1} = E[R X_k Rᵀ] / p, the terms of x have

        E[x xᵀ] = α² Σ_{k=0}^{steps} (X_k + C_k + C_kᵀ),   C_k = Σ_{j=1}^{steps-k} E[R]ʲ X_k.

    It stays finite with growing `steps` if the largest eigenvalue of the map
    M → E[R M Rᵀ] is below p. Going on always, p = 1, has the smallest variance and takes all
    `steps`; p < 1 takes 1 / (1 - p) of them in the mean. Means over several solves are what a small
    p is for.

    What is reported as left is the term after the last one, over α, whose mean is
    (I - αA)^(steps + 1) b; 0 for a series that ended by chance.

    Attributes:
        steps: The highest power, >= 1.
        alpha: α, as for `Neumann`.
        ridge: Solve with A + ridge I.
        on_fail: What to do when more than `rtol` of ‖b‖ is left: "raise", "warn" or "ignore".
        rtol: The part of ‖b‖ that may be left, noise included.
        going_on: p, in (0, 1]; None is 1.

    Raises:
        ValueError: A count below 1, a probability outside of (0, 1].

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LinearOperator, StochasticNeumann, linear_solve
        >>> _ = torch.manual_seed(0)
        >>> def product(diagonal, v):
        ...     return diagonal * v * (0.9 + 0.2 * torch.rand(()))  # 1 in the mean
        >>> A = LinearOperator.from_function(product, torch.tensor([0.8, 1.25]), torch.ones(2))
        >>> solver = StochasticNeumann(20, alpha=1.0)
        >>> x = torch.stack([linear_solve(A, torch.ones(2), solver).value for _ in range(200)])
        >>> torch.allclose(x.mean(0), torch.tensor([1.25, 0.8]), atol=0.03)
        True

    References:
        S. Ghadimi, M. Wang, Approximation Methods for Bilevel Programming, 2018,
        https://arxiv.org/abs/1802.02246 (random products)

        A. Beatson, R. P. Adams, Efficient Optimization of Loops and Limits with Randomized
        Telescoping Sums, ICML 2019, https://arxiv.org/abs/1905.07006 (the random end)
    """

    steps: int = 10
    rtol: float = 0.5
    going_on: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.going_on is not None and not 0 < self.going_on <= 1:
            raise ValueError(
                "StochasticNeumann: going_on: expected a probability in (0, 1] or None, got "
                f"{self.going_on}."
            )

    def run(self, operator: BoundOperator, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum and the norm of the next term over α; `x0` is not used."""
        total = term = b
        for _ in range(self.steps):
            term = self._next(operator, term)
            if self._ended(term):
                break
            total = total + term
        else:
            term = self._next(operator, term)
        return self.alpha * total, norm(term)

    def _next(self, operator: BoundOperator, term: Tensor) -> Tensor:
        following: Tensor = term - self.alpha * operator.fresh().mv(term)
        if self.going_on is None:
            return following
        chance = torch.rand((), dtype=torch.float64, device=term.device)
        return torch.where(chance < self.going_on, following / self.going_on, 0)

    def _ended(self, term: Tensor) -> bool:
        if self.going_on is None:
            return False
        return not int(max_over_batch((term != 0).any().long()))
