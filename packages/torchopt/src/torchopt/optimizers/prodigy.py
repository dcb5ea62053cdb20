# SPDX-License-Identifier: Apache-2.0
"""Prodigy: Adam whose step size is an estimate of the distance to the solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.formulas import divide_by_root, moving_average
from torchopt.optimizers.stages import compose, flip_sign_and_add_weight_decay
from torchopt.params.sharded import completed
from torchopt.transform.base import LeafRule, transformation_of
from torchopt.transform.starts import zeros_like
from torchopt.transform.validate import Hyper, at_least_zero, fraction, positive, unpacked, within

__all__ = ["ScaleByProdigyState", "prodigy", "scale_by_prodigy"]


class ScaleByProdigyState(NamedTuple):
    """`mu`, `nu`: moments of d g; `start`: the first parameters; `sums`: average of d^2 g; and for
    all leaves together, in float64, `r`: average of d^2 <g, start - p>, and `d`: the distance.
    """

    mu: Any
    nu: Any
    start: Any
    sums: Any
    r: Any
    d: Any


@dataclass(frozen=True)
class ScaleByProdigy(LeafRule):
    """u = -lr d (mu / (sqrt(nu) + d eps) + weight_decay p)."""

    lr: Hyper = at_least_zero("learning rate", 1.0)
    b1: Hyper = fraction("beta parameter at index 0", 0.9)
    b2: Hyper = fraction("beta parameter at index 1", 0.999)
    eps: Hyper = at_least_zero("epsilon value", 1e-8)
    weight_decay: Hyper = at_least_zero("weight_decay value", 0.0)
    d0: Hyper = positive("d0 value", 1e-6)
    growth_rate: Hyper | None = within("a number > 1", "growth_rate value", None, optional=True)
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "nu", "start", "sums")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu", "sums")
    reads_params: ClassVar[bool] = True

    def init_leaves(self, params: list[Tensor]) -> ScaleByProdigyState:
        """Return moments of zero, and the distance d0."""
        device = params[0].device if params else None
        return ScaleByProdigyState(
            mu=zeros_like(params, False),
            nu=zeros_like(params, False),
            start=[p.clone() for p in params],
            sums=zeros_like(params, False),
            r=torch.zeros((), dtype=torch.float64, device=device),
            d=torch.as_tensor(self.d0, dtype=torch.float64, device=device).clone(),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        d, root = state.d, self.b2**0.5
        weight = self.lr * (1 - root) * d * d
        updates, mus, nus, sums = [], [], [], []
        r, total = state.r * root, torch.zeros_like(state.r)
        for g, p, mu, nu, start, s in zip(
            grads, params, state.mu, state.nu, state.start, state.sums
        ):
            own = d.to(g)
            mu = moving_average(mu, own * g, self.b1)
            nu = moving_average(nu, (own * g) ** 2, self.b2)
            s = s * root + weight.to(g) * g
            product = (g.to(torch.float64) * (start - p).to(torch.float64)).sum()
            r = r + weight * completed(product).to(r.device)
            total = total + completed(s.to(torch.float64).abs().sum()).to(r.device)
            scaled = divide_by_root(mu, nu, own * self.eps)
            lr = self.lr.to(g) if isinstance(self.lr, Tensor) else self.lr
            updates.append(-lr * own * (scaled + self.weight_decay * p))
            mus.append(mu)
            nus.append(nu)
            sums.append(s)
        known = total > 0
        estimate = torch.where(known, r / torch.where(known, total, 1.0), d)
        if self.growth_rate is not None:
            estimate = torch.minimum(estimate, d * self.growth_rate)
        following = torch.maximum(d, estimate)
        return updates, ScaleByProdigyState(mus, nus, list(state.start), sums, r, following)


@transformation_of(ScaleByProdigy)
def scale_by_prodigy() -> None:
    r"""Return the transformation that computes Prodigy's step.

    .. math::
        \mu' = b_1 \mu + (1 - b_1) d g, \quad \nu' = b_2 \nu + (1 - b_2) d^2 g^2, \quad
        r' = \sqrt{b_2} r + (1 - \sqrt{b_2}) \gamma d^2 \langle g, p_0 - p \rangle, \quad
        s' = \sqrt{b_2} s + (1 - \sqrt{b_2}) \gamma d^2 g

    .. math::
        u = -\gamma d \left(\frac{\mu'}{\sqrt{\nu'} + d \epsilon} + \lambda p\right), \qquad
        d' = \max(d, \min(r' / |s'|_1, q d))

    The inner product and the norm are over all tensors with a gradient, so d is one float64 number
    for all of them. The derivative is exact, also through d. Where a maximum or a minimum has two
    equal arguments, it is a subgradient, the mean of both. d cannot grow before the parameters have
    moved.

    Args:
        lr: gamma, >= 0.
        weight_decay: lambda, >= 0.
        d0: The first d, > 0.
        growth_rate: q, > 1, the largest growth of d in a step; None for any, as in the paper.

    References:
        K. Mishchenko, A. Defazio, Prodigy: An Expeditiously Adaptive Parameter-Free Learner, 2023,
        https://arxiv.org/abs/2306.06101, Algorithm 4.

    Example:
        >>> import torch
        >>> step = scale_by_prodigy(d0=0.1, eps=0.0)
        >>> p, g = torch.tensor([1.0]), torch.tensor([2.0])
        >>> step.update(g, step.init(p), params=p)[0]  # -d mu / sqrt(nu)
        tensor([-0.3162])
    """


@documented(scale_by_prodigy)
def prodigy(
    lr: float | Tensor = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    d0: float = 1e-6,
    growth_rate: float | None = None,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Prodigy, which needs no step size.

    The update is the step of `torchopt.transform.scale_by_prodigy`.

    Args:
        lr: Factor of the estimated step size, >= 0.
        weight_decay: Coefficient of the decoupled decay, >= 0: adds -lr * d * weight_decay * p to
            the update.
        d0: The first estimate of the distance to the solution, > 0; small is safe.
        growth_rate: The largest growth of the estimate in a step, > 1; None for any.
    """
    b1, b2 = unpacked(betas, "betas", (0.9, 0.999))
    step = ScaleByProdigy(lr, b1, b2, eps, weight_decay, d0, growth_rate)
    return compose(flip_sign_and_add_weight_decay.rule(0.0, maximize), step, name="prodigy")
