# SPDX-License-Identifier: Apache-2.0
"""The directions of all fused rules but Adam, in the letters of their papers.

Each function takes the gradient, the state, the step counted from 1 and the hyper-parameters by
name, and returns (direction, new state). Step sizes and weight decay are not part of a direction.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from torchopt.kernels.reference import adam as adam_module
from torchopt.kernels.reference.moments import bias_correction, moving_average
from torchopt.kernels.reference.root import divide_by_root, root
from torchopt.kernels.reference.sign import sign

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


__all__ = [
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adan",
    "amsgrad",
    "asgd",
    "lion",
    "momentum",
    "nadam",
    "nesterov",
    "radam",
    "rmsprop",
    "rmsprop_centered",
    "rmsprop_centered_momentum",
    "rmsprop_momentum",
    "rprop",
    "sgd",
]

Direction = tuple["Tensor", tuple["Tensor", ...]]


def sgd(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return u = g."""
    return g.clone(), ()


def _trace(g: Tensor, trace: Tensor, step: Tensor, h: Mapping[str, Any]) -> Tensor:
    later = (step > 1).to(torch.float64)
    weight: Tensor = 1.0 - later * h["dampening"]
    decayed: Tensor = trace * h["momentum"]
    return decayed + g * weight.to(g.dtype)


def momentum(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return u = t' = momentum t + w g, with w = 1 in the first step and 1 - dampening later."""
    trace = _trace(g, state[0], step, h)
    return trace.clone(), (trace,)


def nesterov(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return u = g + momentum t', with t' as in `momentum`."""
    trace = _trace(g, state[0], step, h)
    return g + trace * h["momentum"], (trace,)


def adam(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return Adam's direction; see `torchopt.kernels.reference.adam`."""
    u, mu, nu = adam_module.adam(g, state[0], state[1], step, **h)
    return u, (mu, nu)


def amsgrad(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return Adam's direction with the largest nu so far: m' = max(m, nu') in the place of nu'.

    References:
        S. Reddi, S. Kale, S. Kumar, On the Convergence of Adam and Beyond, 2018,
        https://arxiv.org/abs/1904.09237, Algorithm 2.
    """
    mu = moving_average(state[0], g, h["b1"])
    nu = moving_average(state[1], g * g, h["b2"])
    nu_max = torch.maximum(state[2], nu)
    mu_hat = mu / bias_correction(h["b1"], step, mu.dtype)
    radicand = nu_max / bias_correction(h["b2"], step, nu.dtype) + h["eps_root"]
    return divide_by_root(mu_hat, radicand, h["eps"]), (mu, nu, nu_max)


def nadam(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return NAdam's direction.

    With m_k = b1 (1 - 0.96^(k psi) / 2) and P_k = m_1 ... m_k (`mu_product` is P_(k-1)):
    u = (g (1 - m_k) / (1 - P_k) + mu' m_(k+1) / (1 - P_k m_(k+1))) / (sqrt(nu_hat) + eps).

    References:
        T. Dozat, Incorporating Nesterov Momentum into Adam, 2016, Algorithm 8, with the schedule
        of torch.optim.NAdam.
    """
    k = step.to(torch.float64)
    decay = torch.as_tensor(h["momentum_decay"], dtype=torch.float64, device=g.device)
    b1 = torch.as_tensor(h["b1"], dtype=torch.float64, device=g.device)
    now = b1 * (1 - 0.5 * torch.exp(math.log(0.96) * k * decay))
    following = b1 * (1 - 0.5 * torch.exp(math.log(0.96) * (k + 1) * decay))
    product = now * h["mu_product"]
    mu = moving_average(state[0], g, h["b1"])
    nu = moving_average(state[1], g * g, h["b2"])
    radicand = nu / bias_correction(h["b2"], step, nu.dtype) + h["eps_root"]
    g_scale = ((1 - now) / (1 - product)).to(g.dtype)
    mu_scale = (following / (1 - product * following)).to(g.dtype)
    return divide_by_root(g * g_scale + mu * mu_scale, radicand, h["eps"]), (mu, nu)


def radam(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return RAdam's direction; the formula is at `torchopt.transform.scale_by_radam`.

    References:
        L. Liu et al., On the Variance of the Adaptive Learning Rate and Beyond, 2020,
        https://arxiv.org/abs/1908.03265, Algorithm 2 (threshold 5 as in torch.optim.RAdam).
    """
    mu = moving_average(state[0], g, h["b1"])
    nu = moving_average(state[1], g * g, h["b2"])
    scalars = radam_scalars(h["b1"], h["b2"], step, mu.dtype)
    return rectify(mu, nu, h["eps"], *scalars), (mu, nu)


def radam_scalars(b1: Any, b2: Any, step: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return whether the variance is rectified, its factor, and the correction of mu, in `dtype`.

    Worked out in float64.
    """
    k = step.to(torch.float64)
    b2 = torch.as_tensor(b2, dtype=torch.float64, device=k.device)
    nu_correction = bias_correction(b2, step, torch.float64)
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * k * torch.pow(b2, k) / nu_correction
    rectified = rho > 5
    # Elsewhere any number above 4 does, so that no derivative is 0 times infinity.
    rho, rho_inf = (torch.where(rectified, x, 6.0) for x in (rho, rho_inf))
    r2 = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    factor = torch.sqrt(r2) * torch.sqrt(nu_correction)
    return rectified, factor.to(dtype), bias_correction(b1, step, torch.float64).to(dtype)


def rectify(
    mu: Tensor, nu: Tensor, eps: Any, rectified: Tensor, factor: Tensor, correction: Tensor
) -> Tensor:
    """Return RAdam's direction from its new moments and the result of `radam_scalars`."""
    scaled = mu / correction
    return torch.where(rectified, divide_by_root(scaled * factor, nu, eps), scaled)


def adamax(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return u = mu' / nu' / (1 - b1^k) with nu' = max(b2 nu, |g| + eps).

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015,
        https://arxiv.org/abs/1412.6980, Algorithm 2 (eps as in torch.optim.Adamax).
    """
    mu = moving_average(state[0], g, h["b1"])
    nu = torch.maximum(state[1] * h["b2"], g.abs() + h["eps"])
    return mu / nu / bias_correction(h["b1"], step, mu.dtype), (mu, nu)


def adan(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return Adan's direction; the formula is at `torchopt.transform.scale_by_adan`.

    References:
        X. Xie, P. Zhou, H. Li, Z. Lin, S. Yan, Adan: Adaptive Nesterov Momentum Algorithm for
        Faster Optimizing Deep Models, 2022, https://arxiv.org/abs/2208.06677, Algorithm 1.
    """
    change = torch.where(step > 1, g - state[3], 0.0)
    mu = moving_average(state[0], g, h["b1"])
    delta = moving_average(state[1], change, h["b2"])
    nu = moving_average(state[2], (g + h["b2"] * change).square(), h["b3"])
    ahead = h["b2"] * delta / bias_correction(h["b2"], step, delta.dtype)
    u = divide_by_root(
        mu / bias_correction(h["b1"], step, mu.dtype) + ahead,
        nu / bias_correction(h["b3"], step, nu.dtype),
        h["eps"],
    )
    return u, (mu, delta, nu, g.clone())


def rmsprop(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return u = g / (sqrt(nu') + eps).

    References:
        T. Tieleman, G. Hinton, Lecture 6.5: RMSProp, 2012.
    """
    nu = moving_average(state[0], g * g, h["alpha"])
    return divide_by_root(g, nu, h["eps"]), (nu,)


def rmsprop_centered(
    g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]
) -> Direction:
    """Return u = g / (sqrt(nu' - mu'^2) + eps).

    References:
        A. Graves, Generating Sequences With Recurrent Neural Networks, 2013,
        https://arxiv.org/abs/1308.0850, equations 38-40.
    """
    mu = moving_average(state[0], g, h["alpha"])
    nu = moving_average(state[1], g * g, h["alpha"])
    return divide_by_root(g, nu - mu * mu, h["eps"]), (mu, nu)


def rmsprop_momentum(
    g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]
) -> Direction:
    """Return `momentum` of `rmsprop`."""
    between, first = rmsprop(g, state[:1], step, h)
    u, second = momentum(between, state[1:], step, h)
    return u, first + second


def rmsprop_centered_momentum(
    g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]
) -> Direction:
    """Return `momentum` of `rmsprop_centered`."""
    between, first = rmsprop_centered(g, state[:2], step, h)
    u, second = momentum(between, state[2:], step, h)
    return u, first + second


def adagrad(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return u = g / (sqrt(s') + eps) with s' = s + g^2; where s' is zero, u is zero.

    References:
        J. Duchi, E. Hazan, Y. Singer, Adaptive Subgradient Methods for Online Learning and
        Stochastic Optimization, JMLR 12, 2011.
    """
    total = state[0] + g * g
    u = torch.where(total == 0, 0.0, divide_by_root(g, total, h["eps"]))
    return u, (total,)


def adadelta(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return u = g sqrt(nu + eps) / sqrt(mu' + eps).

    References:
        M. D. Zeiler, ADADELTA: An Adaptive Learning Rate Method, 2012,
        https://arxiv.org/abs/1212.5701, Algorithm 1.
    """
    mu = moving_average(state[0], g * g, h["rho"])
    u = divide_by_root(g * root(state[1] + h["eps"]), mu + h["eps"], 0.0)
    nu = moving_average(state[1], u * u, h["rho"])
    return u, (mu, nu)


def asgd(
    g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any], p: Tensor
) -> Direction:
    """Return u = eta_k (g + lambda p) and the average of the iterates p - u.

    With eta_k = eta / (1 + lambda eta (k - 1))^alpha, and
    a' = a + (p - u - a) / max(1, k - 1 - t0).

    References:
        B. T. Polyak, A. B. Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992,
        with the step size of torch.optim.ASGD.
    """
    before = step.to(torch.float64) - 1
    eta = h["eta"] / (1 + h["lambd"] * h["eta"] * before) ** h["alpha"]
    weight = 1 / (before - h["t0"]).clamp(min=1)
    u = (g + p * h["lambd"]) * eta.to(g.dtype)
    return u, (state[0] + weight.to(g.dtype) * (p - u - state[0]),)


def rprop(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return Rprop's step; the formula is at `torchopt.transform.scale_by_rprop`.

    References:
        M. Riedmiller, H. Braun, A Direct Adaptive Method for Faster Backpropagation Learning: The
        RPROP Algorithm, 1993, in the variant of torch.optim.Rprop.
    """
    previous, size = state
    agreement = g * previous
    turned = agreement < 0
    grown = torch.where(agreement > 0, size * h["eta_plus"], size)
    size = torch.where(turned, size * h["eta_minus"], grown)
    size = torch.where(size < h["min_step"], h["min_step"], size)
    size = torch.where(size > h["max_step"], h["max_step"], size)
    g = torch.where(turned, 0.0, g)
    return torch.sign(g) * size, (g, size)


def lion(g: Tensor, state: Sequence[Tensor], step: Tensor, h: Mapping[str, Any]) -> Direction:
    """Return u = sign(b1 mu + (1 - b1) g), with the derivative 0; mu' = b2 mu + (1 - b2) g.

    NaN stays NaN.

    References:
        X. Chen et al., Symbolic Discovery of Optimization Algorithms, 2023,
        https://arxiv.org/abs/2302.06675, Algorithm 2.
    """
    u = sign(moving_average(state[0], g, h["b1"]))
    return u, (moving_average(state[0], g, h["b2"]),)
