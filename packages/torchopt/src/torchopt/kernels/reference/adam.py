# SPDX-License-Identifier: Apache-2.0
"""Adam, before the multiplication with the step size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchopt.kernels.reference.moments import bias_correction, moving_average
from torchopt.kernels.reference.root import divide_by_root

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["adam"]


def adam(
    g: Tensor,
    mu: Tensor,
    nu: Tensor,
    count: Tensor,
    *,
    b1: float | Tensor,
    b2: float | Tensor,
    eps: float | Tensor,
    eps_root: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return (u, mu', nu') of one step of Adam.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad \nu' = b_2 \nu + (1 - b_2) g^2, \quad
        u = \frac{\mu' / (1 - b_1^k)}{\sqrt{\nu' / (1 - b_2^k) + \epsilon_{root}} + \epsilon}

    Where the radicand is exactly zero, the derivative of `u` is zero (see `root`).

    Args:
        g: Gradient.
        mu: First moment.
        nu: Second moment.
        count: 0-dim int64 tensor, the step k counted from 1.
        b1: Decay of `mu`, in [0, 1).
        b2: Decay of `nu`, in [0, 1).
        eps: Added to the root, >= 0.
        eps_root: Added under the root, >= 0.

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015,
        https://arxiv.org/abs/1412.6980, Algorithm 1.
    """
    mu = moving_average(mu, g, b1)
    nu = moving_average(nu, g * g, b2)
    mu_hat = mu / bias_correction(b1, count, mu.dtype)
    radicand = nu / bias_correction(b2, count, nu.dtype) + eps_root
    return divide_by_root(mu_hat, radicand, eps), mu, nu
