# SPDX-License-Identifier: Apache-2.0
"""Adam, and AdamW: Adam with weight decay decoupled from the scaling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import bias_correction, divide_by_root, moving_average
from torchopt.optimizers.stages import optimizer
from torchopt.transform.base import transformation_of
from torchopt.transform.fused import Part
from torchopt.transform.plan import Plan
from torchopt.transform.rule import Hyper, Rule, at_least_zero, fraction
from torchopt.tree_function import is_traced
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByAdamState", "adam", "adamw", "scale_by_accelerated_adam", "scale_by_adam"]


class ScaleByAdamState(NamedTuple):
    """`mu`, `nu`: first and second moment; `count`: steps of each leaf, 0-dim int64 tensors."""

    mu: Any
    nu: Any
    count: Any


@dataclass(frozen=True)
class Adam(Rule):
    """u = mu_hat / (sqrt(nu_hat + eps_root) + eps)."""

    b1: Hyper = fraction("beta parameter at index 0", 0.9)
    b2: Hyper = fraction("beta parameter at index 1", 0.999)
    eps: Hyper = at_least_zero("epsilon value", 1e-8)
    eps_root: Hyper = at_least_zero("epsilon value", 0.0)
    moment_requires_grad: bool = False
    State: ClassVar[Any] = ScaleByAdamState
    kernel = "adam"

    def coefficients(self, k: Any, *shared: Tensor) -> tuple[Any, ...]:
        return bias_correction(self.b1, k), bias_correction(self.b2, k)

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        mu_correction, nu_correction = c
        mu = moving_average(state[0], g, self.b1)
        nu = moving_average(state[1], g * g, self.b2)
        radicand = nu / nu_correction + self.eps_root
        return divide_by_root(mu / mu_correction, radicand, self.eps), (mu, nu)


@dataclass(frozen=True)
class AcceleratedAdam(Adam):
    """Adam's direction in one native call for all leaves, or an error."""

    join = Adam.join

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        part = Part(Plan(1, ((0, self),)), "native")
        found = None if is_traced() else part.update(grads, (state,), None, inplace=inplace)
        if found is None:
            return super().update_leaves(grads, state, params, inplace=inplace)
        return found[0], found[1][0]


@transformation_of(Adam)
def scale_by_adam() -> None:
    r"""Return the transformation that computes Adam's direction.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) g, \quad \nu' = b_2 \nu + (1 - b_2) g^2, \quad
        u = \frac{\mu' / (1 - b_1^k)}{\sqrt{\nu' / (1 - b_2^k) + \epsilon_{root}} + \epsilon}

    The corrections 1 - b^k are computed in float64. Where a radicand is zero (no gradient so far,
    and eps_root = 0), the derivative of u is defined to be zero.

    Args:
        eps_root: Added under the square root, >= 0; if > 0, the derivative is finite everywhere.
        moment_requires_grad: Make the initial moments leaves that require a gradient. Gradients
            flow through the moments in any case.

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


@transformation_of(AcceleratedAdam, like=scale_by_adam)
def scale_by_accelerated_adam() -> None:
    """Return the transformation that computes Adam's direction, in one native call for all leaves.

    It computes the same function as `scale_by_adam`, with the same state, differentiable to any
    order with respect to gradients, moments and hyper-parameters. It takes floating-point tensors
    on the CPU, and on CUDA if torchopt was built for it.

    Raises:
        ValueError: A hyper-parameter is out of range.
        KernelUnavailableError: From `update`, for another dtype or device.

    Example:
        >>> import torch
        >>> direction = scale_by_accelerated_adam(eps=0.0)
        >>> g = torch.tensor([3.0, -0.2])
        >>> direction.update(g, direction.init(g))[0]
        tensor([ 1.0000, -1.0000])
    """


@documented(scale_by_adam)
def adam(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    eps_root: float = 0.0,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Return Adam.

    Args:
        use_accelerated_op: Compute the direction of all tensors in one native call; see
            `scale_by_accelerated_adam`.

    Example:
        >>> import torch
        >>> optimizer = adam(0.1, eps=0.0)
        >>> params = (torch.tensor([1.0]),)
        >>> optimizer.update((torch.tensor([2.0]),), optimizer.init(params), inplace=False)[0]
        (tensor([-0.1000]),)
    """
    rule = AcceleratedAdam if use_accelerated_op else Adam
    return optimizer(
        rule.from_betas(betas, eps, eps_root, moment_requires_grad),
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        backend="native" if use_accelerated_op else None,
        name="adam",
    )


@documented(adam, weight_decay=DECOUPLED)
def adamw(
    lr: ScalarOrSchedule = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    eps_root: float = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    moment_requires_grad: bool = False,
    maximize: bool = False,
    use_accelerated_op: bool = False,
) -> GradientTransformation:
    """Return AdamW: Adam with weight decay decoupled from the scaling.

    The update is -lr * (u + weight_decay * p); see `adam`.

    Args:
        mask: Which parameters decay: a tree of bools that is a prefix of the parameters, or a
            function that returns one for the parameters; None for all.

    Raises:
        ValueError: A hyper-parameter is out of range.
        AssertionError: From `update`, when it is called without `params`.

    References:
        I. Loshchilov, F. Hutter, Decoupled Weight Decay Regularization, 2019,
        https://arxiv.org/abs/1711.05101
    """
    rule = AcceleratedAdam if use_accelerated_op else Adam
    return optimizer(
        rule.from_betas(betas, eps, eps_root, moment_requires_grad),
        lr=lr,
        decoupled_weight_decay=weight_decay,
        mask=mask,
        maximize=maximize,
        backend="native" if use_accelerated_op else None,
        name="adamw",
    )
