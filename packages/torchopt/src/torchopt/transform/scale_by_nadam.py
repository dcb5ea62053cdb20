# SPDX-License-Identifier: Apache-2.0
"""NAdam's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.moments import bias_correction, moving_average
from torchopt.kernels.reference.root import divide_by_root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import for_each_distinct, increment, zero_counts
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_betas

__all__ = ["ScaleByNadamState", "scale_by_nadam"]


class ScaleByNadamState(NamedTuple):
    """`mu`, `nu`: moments; `mu_product`: product of the momenta; `count`: steps of each leaf."""

    mu: Any
    nu: Any
    mu_product: Any
    count: Any


@dataclass(frozen=True)
class ScaleByNadam(LeafRule):
    """Adam with Nesterov's momentum."""

    b1: float | Tensor
    b2: float | Tensor
    eps: float | Tensor
    momentum_decay: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "nu",
        "mu_product",
        "count",
    )
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")  # leaves share their product

    def _momentum(self, count: Tensor) -> Tensor:
        exponent = count.to(torch.float64) * self.momentum_decay
        return self.b1 * (1 - 0.5 * torch.pow(torch.full_like(exponent, 0.96), exponent))

    def multiply(self, products: list[Tensor], counts: list[Tensor]) -> list[Tensor]:
        """Return each product times the momentum of its step, once for each distinct pair."""
        return for_each_distinct(
            lambda product, count: product * self._momentum(count), products, counts
        )

    def init_leaves(self, params: list[Tensor]) -> ScaleByNadamState:
        """Return moments and counts of zero and products of one."""
        return ScaleByNadamState(
            mu=zeros_like(params, False),
            nu=zeros_like(params, False),
            mu_product=_ones(params),
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        counts = increment(state.count)
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        nu = [moving_average(n, g * g, self.b2) for g, n in zip(grads, state.nu)]
        scalars = for_each_distinct(
            self._scalars, counts, state.mu_product, [g.dtype for g in grads]
        )
        updates = [
            divide_by_root(weight_g * g + weight_m * m, n / correction, self.eps)
            for g, m, n, (_, weight_g, weight_m, correction) in zip(grads, mu, nu, scalars)
        ]
        products = [product for product, *_ in scalars]
        return updates, ScaleByNadamState(mu=mu, nu=nu, mu_product=products, count=counts)

    def _scalars(self, k: Tensor, product: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the next product, the weights of g and mu, and the correction of nu."""
        now, following = self._momentum(k), self._momentum(k + 1)
        product = product * now
        weight_g = ((1 - now) / (1 - product)).to(dtype)
        weight_m = (following / (1 - product * following)).to(dtype)
        return product, weight_g, weight_m, bias_correction(self.b2, k, dtype)


def _ones(params: list[Tensor]) -> list[Tensor]:
    shared: dict[torch.device, Tensor] = {}
    return [
        shared.setdefault(p.device, torch.ones((), dtype=torch.float64, device=p.device))
        for p in params
    ]


@transformation
def scale_by_nadam(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    momentum_decay: float | Tensor = 4e-3,
) -> LeafRule:
    r"""Return the transformation to NAdam's direction.

    .. math::
        m_k = b_1 (1 - 0.96^{k \psi} / 2), \qquad
        u = \frac{(1 - m_k) g / (1 - \prod_{i \le k} m_i)
        + m_{k+1} \mu' / (1 - \prod_{i \le k+1} m_i)}
        {\sqrt{\nu' / (1 - b_2^k)} + \epsilon}

    with Adam's moments and psi = momentum_decay.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root, >= 0.
        momentum_decay: psi, >= 0.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        T. Dozat, Incorporating Nesterov Momentum into Adam, 2016,
        https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ
    """
    check_at_least_zero(eps, "epsilon value")
    check_betas(b1, b2)
    check_at_least_zero(momentum_decay, "momentum_decay value")
    return ScaleByNadam(b1, b2, eps, momentum_decay)
