# SPDX-License-Identifier: Apache-2.0
"""Yogi's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.moments import moving_average
from torchopt.kernels.reference.root import divide_by_root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.starts import filled_like, zeros_like
from torchopt.transform.validate import check_at_least_zero, check_betas

__all__ = ["ScaleByYogiState", "scale_by_yogi"]


class ScaleByYogiState(NamedTuple):
    """`mu`, `nu`: first and second moment."""

    mu: Any
    nu: Any


@dataclass(frozen=True)
class ScaleByYogi(LeafRule):
    """Adam with an additive second moment."""

    b1: float | Tensor
    b2: float | Tensor
    eps: float | Tensor
    initial_accumulator: float | Tensor
    leaf_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "nu",
    )
    overwritten_fields: ClassVar[tuple[str, ...]] = (
        "mu",
        "nu",
    )

    def init_leaves(self, params: list[Tensor]) -> ScaleByYogiState:
        """Return first moments of zero and second ones of `initial_accumulator`."""
        return ScaleByYogiState(
            mu=zeros_like(params, False),
            nu=filled_like(params, self.initial_accumulator),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new state."""
        mu = [moving_average(m, g, self.b1) for g, m in zip(grads, state.mu)]
        # Finite, so that a difference of two of them is a number.
        squares = [(g * g).clamp(max=torch.finfo(g.dtype).max) for g in grads]
        nu = [n - (1 - self.b2) * torch.sign(n - s) * s for s, n in zip(squares, state.nu)]
        updates = [divide_by_root(m, n, self.eps) for m, n in zip(mu, nu)]
        return updates, ScaleByYogiState(mu=mu, nu=nu)


@transformation
def scale_by_yogi(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-3,
    initial_accumulator: float | Tensor = 1e-6,
) -> LeafRule:
    r"""Return the transformation to Yogi's direction.

    .. math::
        \nu' = \nu - (1 - b_2)\,\mathrm{sign}(\nu - g^2)\,g^2, \qquad
        u = \mu' / (\sqrt{\nu'} + \epsilon)

    with Adam's first moment and, as in the paper, no correction of the bias.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root, >= 0.
        initial_accumulator: What the second moment starts from, >= 0.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        M. Zaheer, S. Reddi, D. Sachan, S. Kale, S. Kumar, Adaptive Methods for Nonconvex
        Optimization, NeurIPS 2018, Algorithm 2.
    """
    check_at_least_zero(eps, "epsilon value")
    check_betas(b1, b2)
    check_at_least_zero(initial_accumulator, "initial_accumulator value")
    return ScaleByYogi(b1, b2, eps, initial_accumulator)
