# SPDX-License-Identifier: Apache-2.0
"""Utilities: numbers that replace losses, computed from all losses together."""

from __future__ import annotations

import torch
from torch import Tensor

from torchopt.diff.zero_order.precision import widened

__all__ = ["centered_ranks", "nes_utilities", "z_scores"]


def centered_ranks(losses: Tensor) -> Tensor:
    """Return the ranks of all entries, scaled to [-1/2, 1/2]; equal losses get equal ranks.

    NaN ranks like infinity, as the worst loss.

    References:
        T. Salimans, J. Ho, X. Chen, S. Sidor, I. Sutskever, Evolution Strategies as a Scalable
        Alternative to Reinforcement Learning, 2017, https://arxiv.org/abs/1703.03864

    Example:
        >>> centered_ranks(torch.tensor([[30.0], [-1.0], [2.0]])).flatten()
        tensor([ 0.5000, -0.5000,  0.0000])
    """
    return _ranks(losses) / max(losses.numel() - 1, 1) - 0.5


def nes_utilities(losses: Tensor) -> Tensor:
    """Return the utilities of natural evolution strategies, which use only the better half.

    With rank k = 1 for the smallest loss and u_k = max(0, log(n/2 + 1) - log k), the utilities are
    1/n - u_k / sum_j u_j, so good losses have negative utilities, like small losses. NaN ranks like
    infinity.

    References:
        D. Wierstra, T. Schaul, T. Glasmachers, Y. Sun, J. Peters, J. Schmidhuber, Natural Evolution
        Strategies, JMLR 15, 2014, section 3.1.

    Example:
        >>> nes_utilities(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([-0.4804, -0.0196,  0.2500,  0.2500])
    """
    n = losses.numel()
    k = _ranks(losses) + 1.0
    u = torch.log(torch.tensor(n / 2 + 1).to(k) / k).clamp(min=0.0)
    utilities: Tensor = 1.0 / n - u / u.sum()
    return utilities


def z_scores(losses: Tensor) -> Tensor:
    """Return the losses minus their mean, divided by their standard deviation; 0 if all are equal.

    If a loss is not finite, all scores are NaN, and so is the gradient.

    Example:
        >>> z_scores(torch.tensor([1.0, 2.0, 3.0, 2.0]))
        tensor([-1.4142,  0.0000,  1.4142,  0.0000])
    """
    wide = widened(losses)
    largest = wide.abs().amax()
    wide = wide / torch.where(largest > 0, largest, torch.ones_like(largest))
    deviation = wide - wide.mean()
    scale = deviation.square().mean().sqrt()
    return deviation / torch.where(scale == 0, torch.ones_like(scale), scale)


def _ranks(losses: Tensor) -> Tensor:
    wide = widened(losses)
    flat = torch.where(wide.isnan(), torch.inf, wide).flatten()
    in_order = flat.sort().values
    smaller = torch.searchsorted(in_order, flat, right=False)
    not_larger = torch.searchsorted(in_order, flat, right=True)
    ranks = (smaller + not_larger - 1).to(wide.dtype) / 2.0
    return ranks.reshape(losses.shape)
