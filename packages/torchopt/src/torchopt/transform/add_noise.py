# SPDX-License-Identifier: Apache-2.0
"""Gradient noise that decays with the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.formulas import in_double
from torchopt.transform.base import transformation_of
from torchopt.transform.rule import Hyper, Rule, at_least_zero

__all__ = ["AddNoiseState", "add_noise"]


class AddNoiseState(NamedTuple):
    """`count`: steps of each leaf, 0-dim int64 tensors."""

    count: Any


@dataclass(frozen=True)
class AddNoise(Rule):
    """u = g + sqrt(eta / k^gamma) noise."""

    eta: Hyper = at_least_zero("eta value", 0.01)
    gamma: Hyper = at_least_zero("gamma value", 0.55)
    generator: torch.Generator | None = None
    State = AddNoiseState

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        variance = in_double(self.eta, k) * torch.pow(k.to(torch.float64), -self.gamma)
        return (variance.sqrt(),)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        if self.generator is None:
            noise = torch.randn_like(g, requires_grad=False)
        else:
            noise = torch.randn(g.shape, generator=self.generator, dtype=g.dtype, device=g.device)
        return g + c[0] * noise, ()


@transformation_of(AddNoise)
def add_noise() -> None:
    r"""Return the transformation that adds normal noise of decreasing variance to gradients.

    .. math::
        u = g + \sqrt{\eta / k^\gamma}\, \xi, \qquad \xi \sim N(0, I)

    with k counted from 1. The sample is a constant for differentiation, so the derivative with
    respect to g is the identity. Under `torch.func.vmap` pass its argument `randomness`.

    Args:
        eta: Variance in the first step, >= 0.
        gamma: Exponent of the decay of the variance, >= 0.
        generator: The generator of random numbers, on the device of the gradients; None for torch's
            own. Every update advances it; it is not part of the state.

    References:
        A. Neelakantan et al., Adding Gradient Noise Improves Learning for Very Deep Networks, 2015,
        https://arxiv.org/abs/1511.06807, equation 1.

    Example:
        >>> noise = add_noise(eta=0.0)
        >>> g = torch.tensor([1.0])
        >>> noise.update(g, noise.init(g))[0]
        tensor([1.])
    """
