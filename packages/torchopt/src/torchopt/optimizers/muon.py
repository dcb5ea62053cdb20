# SPDX-License-Identifier: Apache-2.0
"""Muon: momentum whose singular values are brought close to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.optimizers.adam import adamw
from torchopt.optimizers.sgd import TraceState
from torchopt.optimizers.stages import optimizer
from torchopt.torch_internals import foreach_lerp
from torchopt.transform.orthogonalize import orthogonalize
from torchopt.transform.partition import partition
from torchopt.transform.rule import Hyper, Rule, fraction
from torchopt.transform.validate import unpacked
from torchopt.tree import tree_map
from torchopt.tree_function import are_unfollowed
from torchopt.typing import ScalarOrSchedule

__all__ = ["muon"]


@dataclass(frozen=True)
class Average(Rule):
    """u = t' = momentum t + (1 - momentum) g, or (1 - momentum) g + momentum t' with Nesterov's
    correction.
    """

    momentum: Hyper = fraction("momentum value")
    nesterov: bool = False
    State = TraceState

    def averaged(self, lerp: Callable[..., Any], g: Any, old: Any, weight: Any) -> tuple[Any, Any]:
        """Return the direction and the average, for tensors or for lists of them."""
        t = lerp(g, old, weight)
        return lerp(g, t, weight) if self.nesterov else t, t

    def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
        (old,), weight = state, self.momentum
        if g.dtype is not old.dtype:  # lerp takes one dtype
            dtype = torch.promote_types(g.dtype, old.dtype)
            g, old = g.to(dtype), old.to(dtype)
        if isinstance(weight, Tensor):
            weight = weight.to(device=g.device, dtype=g.dtype)
        u, t = self.averaged(torch.lerp, g, old, weight)
        return u, (t,)

    def directions(
        self, grads: Sequence[Tensor], roles: Any, *rest: Any, inplace: bool = False
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Return directions and averages of all tensors, with two calls in total if possible."""
        (old,), weight = roles, self.momentum
        alike = bool(grads) and all(g.dtype is x.dtype for g, x in zip(grads, old))
        if isinstance(weight, Tensor) or not (alike and are_unfollowed(grads, old)):
            return super().directions(grads, roles, *rest, inplace=inplace)
        u, t = map(list, self.averaged(foreach_lerp, list(grads), old, weight))
        return u, [t]  # not copied: what follows, `orthogonalize`, makes new updates


def _labels(params: Any) -> Any:
    return tree_map(lambda p: "muon" if p is not None and p.ndim == 2 else "adamw", params)


@documented()
def muon(
    lr: ScalarOrSchedule = 1e-3,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    nesterov: bool = True,
    ns_steps: int = 5,
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    *,
    match_rms: bool = False,
    adamw_lr: ScalarOrSchedule | None = None,
    adamw_betas: tuple[float, float] = (0.9, 0.999),
    adamw_eps: float = 1e-8,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Muon for matrices, and AdamW for all other parameters.

    The update of a matrix is -lr * (u + weight_decay * p). Here u is the momentum after
    `torchopt.transform.orthogonalize`, which brings its singular values close to one. The momentum
    is a moving average of the gradient: t' = momentum t + (1 - momentum) g. `torch.optim.Muon`
    does the same with the iteration in bfloat16, and accepts only matrices.

    Args:
        lr: Step size; see `torchopt.adam`.
        momentum: Decay of the momentum, in [0, 1).
        weight_decay: Coefficient of the decoupled decay, >= 0, also of AdamW.
        nesterov: Use Nesterov's correction.
        ns_steps: Number of iterations of the orthogonalization, >= 0.
        ns_coefficients: Coefficients a, b, c of its polynomial.
        eps: Lower bound of the norm by which a matrix is divided, >= 0.
        match_rms: Scale the steps to the size of Adam's, so that one step size suits both.
        adamw_lr: Step size of AdamW; None for `lr`.
        adamw_betas: Decays of AdamW's moments.
        adamw_eps: Added to the square root in AdamW's denominator, >= 0.

    References:
        K. Jordan et al., Muon: An Optimizer for Hidden Layers in Neural Networks, 2024,
        https://kellerjordan.github.io/posts/muon
    """
    coefficients = unpacked(ns_coefficients, "ns_coefficients", (3.4445, -4.775, 2.0315))
    matrices = optimizer(
        Average(momentum, nesterov),
        orthogonalize.rule(ns_steps, coefficients, eps, match_rms),
        lr=lr,
        decoupled_weight_decay=weight_decay,
        maximize=maximize,
    )
    others = adamw(
        lr if adamw_lr is None else adamw_lr,
        unpacked(adamw_betas, "adamw_betas", (0.9, 0.999)),
        adamw_eps,
        weight_decay,
        maximize=maximize,
    )
    return partition({"muon": matrices, "adamw": others}, _labels)
