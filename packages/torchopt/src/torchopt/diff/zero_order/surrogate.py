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
    """Return the losses minus the linear function h'(x - theta), whose gradient is `surrogate`.

    An estimator that is linear in the losses has the mean C h for the linear function, where
    C = E z z' is the covariance of the directions. So the estimate from these losses plus C h has
    the same mean as before, and the variance of the estimate for f - h'x. For antithetic pairs the
    variance falls from norm(g)^2 I + g g' to the same expression with g - h.

    Args:
        estimator: The estimator, linear in the losses; its offsets say where they were taken.
        losses: The losses, `[N, K]`.
        noise: The directions, `[N, *shape]` for each leaf.
        sigma: The size of the perturbation.
        surrogate: h, `[*shape]` for each leaf.

    Returns:
        `[N, K]`, new.

    Raises:
        ValueError: The estimator is not linear in the losses.

    Example:
        >>> from torchopt.diff.zero_order.estimators import antithetic
        >>> losses = torch.tensor([[0.1, -0.1]])  # of f(x) = 2 x_0 + x_1, at 0.1 z and -0.1 z
        >>> z = [torch.tensor([[1.0, -1.0]])]
        >>> control_variate(antithetic, losses, z, 0.1, [torch.tensor([2.0, 1.0])]).abs()
        tensor([[0., 0.]])
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
    """Raise unless `estimator` is linear, so that a control variate does not change its mean."""
    if not estimator.linear:
        raise ValueError(
            f"`surrogate`: expected an estimator that is linear in the losses, got "
            f"{estimator.name}: a surrogate would change the mean of its estimate. Drop the "
            "surrogate, or use an estimator whose losses are not shaped."
        )


def surrogate_mean(
    estimator: Estimator, directions: Directions, surrogate: Sequence[Tensor]
) -> list[Tensor]:
    """Return E d(z) z'h, the mean of the estimate for a linear function with gradient h.

    Raises:
        ValueError: The mean is not known, or the estimator is not linear in the losses.
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
