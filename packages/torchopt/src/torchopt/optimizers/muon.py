# SPDX-License-Identifier: Apache-2.0
"""Muon."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.combine import chain, round_once
from torchopt.documented import documented
from torchopt.optimizers.adam import adamw
from torchopt.optimizers.sgd import trace
from torchopt.optimizers.stages import flip_sign_and_add_weight_decay, scale_by_neg_lr
from torchopt.transform.add_decayed_weights import add_decayed_weights
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.linear import Scale
from torchopt.transform.orthogonalize import orthogonalize
from torchopt.transform.partition import partition
from torchopt.transform.validate import unpacked
from torchopt.tree import tree_map
from torchopt.typing import ScalarOrSchedule

__all__ = ["muon"]


@dataclass(frozen=True)
class _ScaleByComplement(LeafRule):
    """u = (1 - momentum) * g."""

    momentum: float | Tensor

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        return Scale(1 - self.momentum).update_leaves(grads, state, params, inplace=inplace)


@transformation
def _scale_by_complement(momentum: float | Tensor) -> LeafRule:
    """Return the transformation u = (1 - momentum) * g."""
    return _ScaleByComplement(momentum)


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

    The update of a matrix is -lr * (u + weight_decay * p), with u the momentum with singular values
    close to one; see `torchopt.transform.orthogonalize`. The momentum is a moving average of the
    gradient: t' = momentum t + (1 - momentum) g. `torch.optim.Muon` is the same with its iteration
    in bfloat16, and refuses parameters that are not matrices.

    Args:
        lr: Step size; see `torchopt.adam`.
        momentum: Decay of the momentum, in (0, 1).
        weight_decay: Coefficient of the decoupled decay, >= 0, of AdamW too.
        nesterov: Use Nesterov's correction.
        ns_steps: Iterations of the orthogonalization.
        ns_coefficients: Coefficients of its polynomial.
        eps: Smallest norm that a matrix is divided by.
        match_rms: Scale the steps to the size of Adam's, so that one step size serves both.
        adamw_lr: Step size of AdamW; None for `lr`.
        adamw_betas: Decays of AdamW's moments.
        adamw_eps: Added to AdamW's root.

    References:
        K. Jordan et al., Muon: An Optimizer for Hidden Layers in Neural Networks, 2024,
        https://kellerjordan.github.io/posts/muon
    """
    matrices = round_once(
        chain(
            flip_sign_and_add_weight_decay(0.0, maximize),
            _scale_by_complement(momentum),
            trace(momentum, 0.0, nesterov),
            orthogonalize(
                ns_steps, unpacked(ns_coefficients, 3, "ns_coefficients"), eps, match_rms
            ),
            add_decayed_weights(weight_decay),
            scale_by_neg_lr(lr),
        )
    )
    others = adamw(
        lr if adamw_lr is None else adamw_lr,
        unpacked(adamw_betas, 2, "adamw_betas"),
        adamw_eps,
        weight_decay,
        maximize=maximize,
    )
    return partition({"muon": matrices, "adamw": others}, _labels)
