# SPDX-License-Identifier: Apache-2.0
"""Low-rank perturbations of the weights of any module.

A weight of shape `[m, ...]`, seen as a matrix `[m, n]`, is perturbed by

    E = A B' / sqrt(r),   A [m, r], B [n, r] standard normal:   E[vec E] = 0, Cov(vec E) = I.

So the estimators remain valid with r (m + n) random numbers instead of m n, and the perturbed layer
is the unperturbed one plus two thin products:

    linear     x (W + s E)' = x W' + s/sqrt(r) (x B) A'
    conv       a convolution with B (r filters), then a 1 x 1 convolution with A
    embedding  row i of (W + s E) = W[i] + s/sqrt(r) A[i] B'

All members share the product with W. A weight that is used in any other way is perturbed as a whole
matrix, which is slower and gives the same result. Parameters with fewer than two dimensions get
dense noise.

References:
    B. Sarkar et al., Evolution Strategies at the Hyperscale, 2025, https://arxiv.org/abs/2511.16652
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from torchopt.diff.call_state import CallState
from torchopt.diff.zero_order.directions import Gaussian, draw_seed
from torchopt.diff.zero_order.error_bars import GradientEstimate, effective_sample_size
from torchopt.diff.zero_order.estimators import Estimator, as_estimator
from torchopt.diff.zero_order.evaluate import ENTRIES_PER_CHUNK
from torchopt.diff.zero_order.evaluator import Evaluator, Points
from torchopt.diff.zero_order.factors import Factors, LowRankNoise, Perturb, Total, square_norms
from torchopt.diff.zero_order.loop import sum_over_directions
from torchopt.diff.zero_order.precision import (
    require_sigma,
    warn_of_lost_perturbations,
    widened,
)
from torchopt.params.functional import functional_call
from torchopt.tree_function import uncompiled

__all__ = ["Factors", "LowRank", "LowRankNoise"]


@dataclass(frozen=True)
class LowRank:
    """Zero-order gradients of a module from low-rank perturbations.

    For a linear loss with the gradient G for a weight, an antithetic pair of rank r has mean G and

        Cov_ij,kl = G_ij G_kl + |G|^2 d_ik d_jl + 2/r ((GG')_ik d_jl + d_ik (G'G)_jl + G_il G_kj),

    where d is the identity matrix; the first two terms are those of dense Gaussian directions.

    Attributes:
        rank: r, the rank of the perturbations, >= 1.
        method: The estimator, or its name; antithetic by default.
        num_samples: N, the number of members (pairs, for antithetic), >= 1.
        sigma: The size of the perturbation, > 0, in the units of the parameters.
        chunk_size: How many members are evaluated together by vmap; None: as many as keep their
            random numbers within 2**23. Choose fewer for functions with large intermediate results.
        vectorized: True: by vmap, or raise. False: in a loop. None: by vmap if that works, else in
            a loop, with one warning.

    Raises:
        ValueError: An option is out of its range, or the estimator is not linear in the directions.

    Example:
        >>> net = nn.Linear(3, 1, bias=False).double()
        >>> x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
        >>> engine = LowRank(rank=2, num_samples=4000)
        >>> result = engine.estimate(net, lambda net: net(x).sum(), seed=0)
        >>> bool((result.gradient["weight"] - x).abs().max() < 0.3)
        True
    """

    rank: int = 1
    method: str | Estimator = "antithetic"
    num_samples: int = 1
    sigma: float = 0.01
    chunk_size: int | None = None
    vectorized: bool | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "num_samples", "chunk_size"):
            value = getattr(self, name)
            if value is None and name == "chunk_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}`: expected an integer of at least 1, got {value!r}.")
        require_sigma(self.sigma)
        if as_estimator(self.method).dual(torch.tensor(2.0)) != 2.0:
            raise ValueError("LowRank: expected an estimator linear in the directions, not spsa.")

    def noise(self, params: Mapping[str, Tensor], seed: int, start: int, stop: int) -> LowRankNoise:
        """Return members `start` to `stop - 1` of the family that `seed` determines."""
        like, slots = [], []
        for name, p in params.items():
            if p.ndim < 2:
                slots.append((name, 1))
                like.append(p)
            else:
                slots.append((name, 2))
                like.append(p.new_empty(p.shape[0], self.rank))
                like.append(p.new_empty(p[0].numel(), self.rank))
        drawn = iter(Gaussian().draw(like, seed, start, stop))
        factors, dense = {}, {}
        for name, count in slots:
            if count == 1:
                dense[name] = next(drawn)
            else:
                factors[name] = Factors(next(drawn), next(drawn))
        return LowRankNoise(factors, dense)

    @uncompiled
    @torch.no_grad()
    def losses(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        noise: LowRankNoise,
        s: float,
        *,
        seed: int = 0,
    ) -> Tensor:
        """Return `loss(module)` with the parameters at theta + s sigma z, `[members]`.

        Args:
            module: The module; its parameters and buffers are not changed.
            loss: Maps the module to a 0-dim loss.
            noise: The members.
            s: The offset, in units of sigma.
            seed: The seed of random draws inside `loss` (dropout), common to all members.
        """
        return self._losses(module, loss, noise, s, seed, Evaluator(self.vectorized))

    def _losses(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        noise: LowRankNoise,
        s: float,
        seed: int,
        evaluator: Evaluator,
    ) -> Tensor:
        params = _trainable(module)
        buffers = dict(module.named_buffers())
        state = CallState((module, loss), (*params.values(), *buffers.values()))
        scale = s * self.sigma
        shell = _Loss(module, loss)
        names = list(noise.factors)
        dense = list(noise.dense)

        def member(*tensors: Tensor) -> Tensor:
            state.reset()
            parts = iter(tensors)
            factors = {id(params[name]): Factors(next(parts), next(parts)) for name in names}
            swapped = {f"module.{name}": params[name] + scale * next(parts) for name in dense}
            swapped.update({f"module.{name}": next(parts) for name in buffers})
            with Perturb(factors, scale):
                result = functional_call(shell, swapped, ())
            if not isinstance(result, Tensor) or result.ndim != 0:
                got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise TypeError(f"`loss`: expected a 0-dim tensor, got {got}.")
            return result

        pairs = [t for name in names for t in (noise.factors[name].A, noise.factors[name].B)]
        points = [*pairs, *(noise.dense[name] for name in dense)]
        with state.held():
            copied = list(buffers.values())
            values = evaluator(member, Points.stored(points), copied, seed ^ 0x5DEECE66D)
        return widened(values)

    @uncompiled
    @torch.no_grad()
    def estimate(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        *,
        seed: int | None = None,
        with_error: bool = True,
    ) -> GradientEstimate:
        """Return the estimated gradients, by name, of the parameters that require gradients.

        For a weight it is 1/N sum_i c_i A_i B_i' / sqrt(r), one product of inner size N r.

        Args:
            module: The module; its parameters and buffers are not changed.
            loss: Maps the module to a 0-dim loss. Its random draws are common to all members.
            seed: Determines the members; None: drawn from torch's generator.
            with_error: Whether to estimate the standard error, which takes a product of inner size
                N r^2.

        Raises:
            RuntimeError: The module has no parameters that require gradients.
            TypeError: A parameter is complex, or the loss is not a 0-dim tensor.
        """
        params = _trainable(module)
        estimator = as_estimator(self.method)
        weights = list(params.values())
        warn_of_lost_perturbations(weights, self.sigma, True, lambda k: f"`{list(params)[k]}`")
        n, seed = self.num_samples, draw_seed() if seed is None else seed
        space = _Members(self, module, loss, params, seed, Evaluator(self.vectorized))
        totals = {name: Total(p, with_error and n > 1) for name, p in params.items()}
        coefficients: list[Tensor] = []

        def add(c: Tensor, noise: LowRankNoise) -> None:
            coefficients.append(c)
            for name, f in noise.factors.items():
                totals[name].add_factors(c, f)
            for name, z in noise.dense.items():
                totals[name].add_dense(c, z)

        sum_over_directions(
            space,
            estimator.coefficients,
            add,
            center=space.center() if estimator.uses_center else None,
            local=estimator.local,
            uses_norms=estimator.uses_norms,
        )
        error = None
        if with_error and n > 1:
            error = {name: total.standard_error(n) for name, total in totals.items()}
        count = n * len(estimator.offsets) + int(estimator.uses_center)
        means = {name: total.mean(n) for name, total in totals.items()}
        effective = effective_sample_size(torch.cat(coefficients))
        return GradientEstimate(means, error, effective, count)


@dataclass
class _Members:
    """The space of perturbations of a module."""

    engine: LowRank
    module: nn.Module
    loss: Callable[[nn.Module], Tensor]
    params: dict[str, Tensor]
    seed: int
    evaluator: Evaluator
    coupled: ClassVar[int] = 1

    @property
    def sigma(self) -> float:
        return self.engine.sigma

    @property
    def chunks(self) -> list[tuple[int, int]]:
        entries = sum(
            p.numel() if p.ndim < 2 else self.engine.rank * (p.shape[0] + p[0].numel())
            for p in self.params.values()
        )
        rows = self.engine.chunk_size or max(1, ENTRIES_PER_CHUNK // max(entries, 1))
        n = self.engine.num_samples
        return [(i, min(i + rows, n)) for i in range(0, n, rows)]

    def draw(self, start: int, stop: int) -> LowRankNoise:
        return self.engine.noise(self.params, self.seed, start, stop)

    def evaluate(self, noise: LowRankNoise) -> Tensor:
        offsets = as_estimator(self.engine.method).offsets
        return torch.stack([self._at(noise, s) for s in offsets], dim=1)

    def center(self) -> Tensor:
        return self._at(self.draw(0, 1), 0.0)[0]

    def _at(self, noise: LowRankNoise, s: float) -> Tensor:
        losses = self.engine._losses
        return losses(self.module, self.loss, noise, s, self.seed, self.evaluator)

    def square_norms(self, noise: LowRankNoise, like: Tensor) -> Tensor:
        return square_norms(noise).to(like)


class _Loss(nn.Module):
    def __init__(self, module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss = loss

    def forward(self) -> Tensor:
        return self.loss(self.module)


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    params: dict[str, Tensor] = {k: p for k, p in module.named_parameters() if p.requires_grad}
    if not params:
        raise RuntimeError("The module has no parameters that require gradients.")
    for name, p in params.items():
        if not p.is_floating_point():
            raise TypeError(
                f"LowRank: expected real floating-point parameters, got {p.dtype} at `{name}`. "
                "Use ZeroOrder for complex ones, or freeze it."
            )
    return params
