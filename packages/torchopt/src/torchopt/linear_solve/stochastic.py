# SPDX-License-Identifier: Apache-2.0
r"""Solvers for random operators: A = E[Â], and each product uses a new draw Â.

An operator that draws random numbers, such as a minibatch, is bound again for each product. For
independent draws, the expectation of a product is the product of the expectations. So in
expectation both solvers equal deterministic ones, which determines their bias. The second moments
E[x xᵀ] obey linear recursions, which each solver states; subtracting the product of the means gives
the covariance.
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
from torchopt.shown import shown
from torchopt.tree_function import max_over_batch

__all__ = ["StochasticGradient", "StochasticNeumann"]


@dataclass(frozen=True)
class _Stochastic(Solver):
    """The common options of the stochastic solvers.

    Attributes:
        steps: The number of random products, >= 1, plus one for the reported residual.
        alpha: The step size α.
        ridge: Solve with A + ridge I; None: no ridge.
        on_fail: What to do if the residual is above `rtol` ‖b‖: "raise", "warn" or "ignore".
        rtol: The largest residual relative to ‖b‖, >= 0.
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
        """Return the solution and the norm of the residual."""

    def init(self, operator: BoundOperator, like: Tensor) -> tuple[BoundOperator, float]:
        """Return the operator, and the eps of its dtype."""
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
        """What `solver(matvec, b)` does with an inaccurate answer."""
        return self.on_fail

    @property
    def is_stochastic(self) -> bool:
        """True."""
        return True

    @property
    def shift(self) -> float | Tensor | None:
        """The ridge."""
        return self.ridge


def _require_count(
    solver: str, name: str, count: Any, expected: str, most: float = math.inf
) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
        raise ValueError(f"{solver}: {name}: expected {expected}, got {shown(count)}.")


@dataclass(frozen=True)
class StochasticGradient(_Stochastic):
    r"""Stochastic gradient descent, or fixed-point iteration, for A x = b with random products.

    The iteration is x_{k+1} = x_k - α_k (Â_k x_k - b) with α_k = α / (1 + decay k), from zero. For
    a fixed point, whose operator is ∂T/∂x - 1, α = -1 gives the iteration x ← T̂(x) of the
    reference.

    Bias: E[x_K] - x* = Π_k (I - α_k A) (x_0 - x*), the error of the same steps with A itself. It
    tends to zero with K if the spectral radius of I - α_k A is below 1.

    Variance: with R_k = I - α_k Â_k, μ_k = E[x_k] and M_k = E[x_k x_kᵀ],

        M_{k+1} = E[R_k M_k R_kᵀ] + α_k (E[R_k] μ_k bᵀ + b μ_kᵀ E[R_k]ᵀ) + α_k² b bᵀ.

    If E‖(Â - A) x‖² ≤ σ² ‖x‖² and ‖I - α A‖ ≤ q < 1, the trace of the covariance is at most
    α² σ² max_k E‖x_k‖² / (1 - q²). So a constant α leaves a variance of order α, and a decaying α
    leaves none. The mean of the last iterates has a smaller variance than the last one.

    Derivatives of a solve are solves with draws of their own. The reported residual is the mean of
    b - Â_k x_k over the averaged iterates, or over the second half of the steps. It estimates the
    residual of the mean iterate and contains noise.

    Attributes:
        steps: The number of steps, each with one random product, >= 1.
        alpha: The first step size.
        ridge: Solve with A + ridge I; None: no ridge.
        on_fail: What to do if the residual is above `rtol` ‖b‖: "raise", "warn" or "ignore".
        rtol: The largest residual relative to ‖b‖, including noise, >= 0.
        decay: How fast the step size decreases, >= 0; 0: it is constant.
        average: The number of last iterates whose mean is returned, in [1, steps].

    Raises:
        ValueError: An option is out of its range.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LinearOperator, StochasticGradient, linear_solve
        >>> _ = torch.manual_seed(0)
        >>> rows = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [2.0, -2.0]])
        >>> def product(rows, v):  # for one random row; the mean is rows.T @ rows / 4
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

    Each product uses a draw of its own. With `going_on`, a probability p, the series is truncated
    at random: after each term it continues with probability p, and later terms are divided by p.

    Bias: -(I - αA)^(steps + 1) x*, that of the truncated series, also with `going_on`.

    Variance: with R = I - αÂ, X_0 = b bᵀ and X_{k+1} = E[R X_k Rᵀ] / p, the terms of x satisfy

        E[x xᵀ] = α² Σ_{k=0}^{steps} (X_k + C_k + C_kᵀ),   C_k = Σ_{j=1}^{steps-k} E[R]ʲ X_k.

    It remains bounded for growing `steps` if the largest eigenvalue of the map M → E[R M Rᵀ] is
    below p. p = 1 has the smallest variance and takes all `steps`; p < 1 takes about 1 / (1 - p)
    steps on average. A small p is meant for averages over several solves.

    The reported residual is the term after the last one, divided by α, whose mean is
    (I - αA)^(steps + 1) b; it is 0 for a series that ended at random.

    Attributes:
        steps: The highest power, >= 1.
        alpha: The factor α, as for `Neumann`.
        ridge: Solve with A + ridge I; None: no ridge.
        on_fail: What to do if the residual is above `rtol` ‖b‖: "raise", "warn" or "ignore".
        rtol: The largest residual relative to ‖b‖, including noise, >= 0.
        going_on: The probability p to continue, in (0, 1]; None: 1.

    Raises:
        ValueError: An option is out of its range.

    Example:
        >>> import torch
        >>> from torchopt.linear_solve import LinearOperator, StochasticNeumann, linear_solve
        >>> _ = torch.manual_seed(0)
        >>> def product(diagonal, v):
        ...     return diagonal * v * (0.9 + 0.2 * torch.rand(()))  # 1 on average
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
        """Return the sum, and the norm of the next term divided by α; `x0` is not used."""
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
