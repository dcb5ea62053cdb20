# SPDX-License-Identifier: Apache-2.0
"""Adam's direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.kernels.fused_adam import AdamHyper, fused_adam, fused_adam_
from torchopt.kernels.reference.adam import adam
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.trace import zeros_like
from torchopt.transform.validate import check_at_least_zero, check_betas
from torchopt.tree_function import any_watched, is_traced

__all__ = ["ScaleByAdamState", "scale_by_accelerated_adam", "scale_by_adam"]


class ScaleByAdamState(NamedTuple):
    """`mu`, `nu`: first and second moment; `count`: steps of each leaf, 0-dim int64 tensors."""

    mu: Any
    nu: Any
    count: Any


@dataclass(frozen=True)
class ScaleByAdam(LeafRule):
    """Adam's direction in plain torch operations."""

    b1: float | Tensor
    b2: float | Tensor
    eps: float | Tensor
    eps_root: float | Tensor
    moment_requires_grad: bool
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "nu", "count")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu")

    def init_leaves(self, params: list[Tensor]) -> ScaleByAdamState:
        """Return moments and counts of zero."""
        return ScaleByAdamState(
            mu=zeros_like(params, self.moment_requires_grad),
            nu=zeros_like(params, self.moment_requires_grad),
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new moments."""
        counts = increment(state.count)
        rows = [
            adam(
                g,
                mu,
                nu,
                count,
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                eps_root=self.eps_root,
            )
            for g, mu, nu, count in zip(grads, state.mu, state.nu, counts)
        ]
        updates, mu, nu = ([row[i] for row in rows] for i in range(3))
        return updates, ScaleByAdamState(mu=mu, nu=nu, count=counts)


@dataclass(frozen=True)
class ScaleByFusedAdam(ScaleByAdam):
    """Adam's direction in one native call for all leaves."""

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the directions and the new moments."""
        counts = increment(state.count)
        hyper = AdamHyper(self.b1, self.b2, self.eps, self.eps_root)
        tensors = [x for x in hyper.as_dict().values() if isinstance(x, Tensor)]
        if inplace and not tensors and _may_be_written(grads, state.mu, state.nu):
            updates = fused_adam_(grads, state.mu, state.nu, counts, hyper)
            return updates, ScaleByAdamState(mu=state.mu, nu=state.nu, count=counts)
        updates, mu, nu = fused_adam(grads, state.mu, state.nu, counts, hyper)
        return updates, ScaleByAdamState(mu=mu, nu=nu, count=counts)


def _may_be_written(*roles: list[Tensor]) -> bool:
    """Return whether the native call may write to these tensors: nothing watches them."""
    tensors = [x for role in roles for x in role]
    return not is_traced() and all(x.is_contiguous() for x in tensors) and not any_watched(tensors)


def _check(b1: Any, b2: Any, eps: Any, eps_root: Any) -> None:
    check_at_least_zero(eps, "epsilon value")
    check_at_least_zero(eps_root, "epsilon value")
    check_betas(b1, b2)


@transformation
def scale_by_adam(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    eps_root: float | Tensor = 0.0,
    moment_requires_grad: bool = False,
) -> LeafRule:
    r"""Return the transformation to Adam's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad \nu' = b_2 \nu + (1 - b_2) g^2, \quad
        u = \frac{\mu' / (1 - b_1^k)}{\sqrt{\nu' / (1 - b_2^k) + \epsilon_{root}} + \epsilon}

    The corrections 1 - b^k are computed in float64 for every dtype. Where a radicand is exactly
    zero (no gradient so far, and eps_root = 0), the derivative of u is defined to be zero.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root, >= 0.
        eps_root: Added under the root, >= 0; a positive one makes the derivative finite everywhere.
        moment_requires_grad: Make the initial moments leaves that require a gradient. Gradients
            flow through the moments either way.

    Raises:
        ValueError: A hyper-parameter out of range.

    References:
        D. P. Kingma, J. Ba, Adam: A Method for Stochastic Optimization, 2015,
        https://arxiv.org/abs/1412.6980, Algorithm 1.

    Example:
        >>> import torch
        >>> direction = scale_by_adam(eps=0.0)
        >>> params = {"w": torch.zeros(2)}
        >>> grads = {"w": torch.tensor([3.0, -0.2])}
        >>> direction.update(grads, direction.init(params))[0]
        {'w': tensor([ 1.0000, -1.0000])}
    """
    _check(b1, b2, eps, eps_root)
    return ScaleByAdam(b1, b2, eps, eps_root, moment_requires_grad)


@transformation
def scale_by_accelerated_adam(
    b1: float | Tensor = 0.9,
    b2: float | Tensor = 0.999,
    eps: float | Tensor = 1e-8,
    eps_root: float | Tensor = 0.0,
    moment_requires_grad: bool = False,
) -> LeafRule:
    """Return the transformation to Adam's direction, in one native call for all leaves.

    The same function and state as `scale_by_adam`, differentiable to any order with respect to
    gradients, moments and hyper-parameters. For the floating-point dtypes on the CPU, and on CUDA
    where torchopt was built for it.

    Raises:
        ValueError: A hyper-parameter out of range.
        KernelUnavailableError: From `update`, for another dtype or device.
    """
    _check(b1, b2, eps, eps_root)
    return ScaleByFusedAdam(b1, b2, eps, eps_root, moment_requires_grad)
