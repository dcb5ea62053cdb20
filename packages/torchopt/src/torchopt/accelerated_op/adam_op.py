# SPDX-License-Identifier: Apache-2.0
"""Adam's direction for one tensor, as a callable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.optimizers.adam import AcceleratedAdam, ScaleByAdamState
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
        self.rule = AcceleratedAdam(b1, b2, eps, eps_root)
        self.inplace = inplace

    def __call__(
        self, mu: Tensor, nu: Tensor, updates: Tensor | None, count: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (mu', nu', direction) of the step `count`, counted from 1."""
        if updates is None:
            return mu, nu, None
        learned = [getattr(self.rule, name) for name in self.rule.fields_with_tensors]
        watched = any_watched((mu, nu, updates, *learned))
        before = torch.as_tensor(count, dtype=torch.int64, device=mu.device) - 1
        state = ScaleByAdamState([mu], [nu], [before])
        if self.inplace and watched:  # what is overwritten must not be what the derivative needs
            state = ScaleByAdamState([mu.clone()], [nu.clone()], [before])
        (direction,), new = self.rule.update_leaves(
            [updates], state, [], inplace=self.inplace and not watched
        )
        if self.inplace and watched:
            return mu.copy_(new.mu[0]), nu.copy_(new.nu[0]), direction
        return new.mu[0], new.nu[0], direction
