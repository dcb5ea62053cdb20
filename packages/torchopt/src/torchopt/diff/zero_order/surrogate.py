# SPDX-License-Identifier: Apache-2.0
"""Control variates: a cheap gradient that changes the variance of an estimate, not its mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchopt.diff.zero_order.precision import accumulator, widened

if TYPE_CHECKING:
    from torchopt.diff.zero_order.directions import Directions
    from torchopt.diff.zero_order.estimators import Estimator

__all__ = ["control_variate", "require_linear", "surrogate_mean"]


def control_variate(
    estimator: Estimator,
    losses: Tensor,
    noise: Sequence[Tensor],
    sigma: float,
    surrogate: Sequence[Tensor],
) -> Tensor:
    """Return the losses less the linear function h'(x - theta), whose gradient is `surrogate`.

    The estimate from these losses plus C h, with C = E z z' the covariance of the directions, has
    the same mean, as an estimator that is linear in the losses has mean C h for the linear
    function. Its variance is that of the estimate of f - h'x: that of antithetic pairs falls from
    norm(g)^2 I + g g' to the same with g - h.

    Args:
        estimator: Says where the losses were taken. Linear in the losses.
        losses: `[N, K]`.
        noise: Directions, for each leaf `[N, *shape]`.
        sigma: Size of the perturbation.
        surrogate: h, for each leaf `[*shape]`.

    Returns:
        `[N, K]`, new.

    Raises:
        ValueError: The estimator is not linear in the losses.
    """
    require_linear(estimator)
    losses = widened(losses)
    slope = torch.zeros_like(losses[:, 0])
    for z, h in zip(noise, surrogate, strict=True):
        dtype = accumulator(z.dtype)
        slope += (z.reshape(len(z), h.numel()).to(dtype) @ h.flatten().to(dtype)).to(slope)
    offsets = torch.tensor(estimator.offsets, dtype=losses.dtype, device=losses.device)
    return losses - sigma * slope[:, None] * offsets


def require_linear(estimator: Estimator) -> None:
    """Raise unless a control variate leaves the mean of `estimator` alone."""
    if not estimator.linear:
        raise ValueError(
            f"`surrogate`: expected an estimator that is linear in the losses, got "
            f"{estimator.name}: a surrogate would change the mean of its estimate. Drop the "
            "surrogate, or use an estimator whose losses are not shaped."
        )


def surrogate_mean(
    estimator: Estimator, directions: Directions, surrogate: Sequence[Tensor]
) -> list[Tensor]:
    """Return E d(z) z'h: the mean of the estimate of a linear function with gradient h.

    Raises:
        ValueError: It is not known, or the estimator is not linear in the losses.
    """
    require_linear(estimator)
    moment = directions.second_moment(surrogate)
    if estimator.dual(torch.tensor(2.0)) == 2.0:
        return moment
    if any(not torch.equal(x, h) for x, h in zip(moment, surrogate)):
        raise ValueError(
            f"`surrogate`: expected directions of covariance I for {estimator.name}, got "
            f"{type(directions).__name__}. Use Rademacher()."
        )
    return moment
