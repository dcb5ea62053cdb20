# SPDX-License-Identifier: Apache-2.0
"""Adam's direction for one tensor, as a callable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.kernels.native import update
from torchopt.optimizers.adam import Adam
from torchopt.transform.plan import Plan
from torchopt.tree_function import any_watched

__all__ = ["AdamOp"]


class AdamOp:
    """Adam's direction in one native call; see `torchopt.transform.scale_by_accelerated_adam`.

    Args:
        b1: Decay of the first moment. Numbers, or 0-dim tensors, which are differentiated.
        b2: Decay of the second moment.
        eps: Added to the root.
        eps_root: Added under the root.
        inplace: Write the new moments into the old ones.
    """

    def __init__(
        self,
        b1: float | Tensor = 0.9,
        b2: float | Tensor = 0.999,
        eps: float | Tensor = 1e-8,
        *,
        eps_root: float | Tensor = 0.0,
        inplace: bool = True,
    ) -> None:
        self.plan = Plan(rules=((0, Adam(b1, b2, eps, eps_root)),))
        self.inplace = inplace

    def __call__(
        self, mu: Tensor, nu: Tensor, updates: Tensor | None, count: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (mu', nu', direction) of the step `count`, counted from 1."""
        if updates is None:
            return mu, nu, None
        counts = [torch.as_tensor(count, dtype=torch.int64, device=mu.device)]
        hypers = self.plan.constants
        watched = any_watched(
            (mu, nu, updates, *(h for h in hypers.values() if isinstance(h, Tensor)))
        )
        # What is overwritten must not be what the derivative needs.
        states = [
            [mu.clone() if self.inplace and watched else mu],
            [nu.clone() if self.inplace and watched else nu],
        ]
        (direction,), ((new_mu,), (new_nu,)) = update(
            self.plan.fused,
            [updates],
            states,
            None,
            counts,
            hypers,
            inplace=self.inplace and not watched,
        )
        if self.inplace and watched:
            return mu.copy_(new_mu), nu.copy_(new_nu), direction
        return new_mu, new_nu, direction
