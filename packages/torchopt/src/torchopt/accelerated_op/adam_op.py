# SPDX-License-Identifier: Apache-2.0
"""Adam's direction for one tensor, as a callable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchopt.kernels.fused_adam import AdamHyper, fused_adam, fused_adam_
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
        self.hyper = AdamHyper(b1, b2, eps, eps_root)
        self.inplace = inplace

    def __call__(
        self, mu: Tensor, nu: Tensor, updates: Tensor | None, count: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (mu', nu', direction) of the step `count`, counted from 1."""
        if updates is None:
            return mu, nu, None
        counts = [torch.as_tensor(count, dtype=torch.int64, device=mu.device)]
        hypers = (x for x in self.hyper.as_dict().values() if isinstance(x, Tensor))
        watched = any_watched((mu, nu, updates, *hypers))
        if self.inplace and not watched and mu.is_contiguous() and nu.is_contiguous():
            (direction,) = fused_adam_([updates], [mu], [nu], counts, self.hyper)
            return mu, nu, direction
        # What is overwritten below must not be what the derivative needs.
        old_mu, old_nu = (mu.clone(), nu.clone()) if self.inplace else (mu, nu)
        (direction,), (new_mu,), (new_nu,) = fused_adam(
            [updates], [old_mu], [old_nu], counts, self.hyper
        )
        if self.inplace:
            return mu.copy_(new_mu), nu.copy_(new_nu), direction
        return new_mu, new_nu, direction
