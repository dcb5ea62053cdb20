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

    The hyper-parameters are numbers, or 0-dim tensors, which are differentiated.

    Args:
        b1: Decay of the first moment, in [0, 1).
        b2: Decay of the second moment, in [0, 1).
        eps: Added to the root, >= 0.
        eps_root: Added under the root, >= 0.
        inplace: Write the new moments into the old ones.

    Raises:
        ValueError: A hyper-parameter is out of range.
        KernelUnavailableError: From a call, for a dtype or device without a kernel.

    Example:
        >>> import torch
        >>> direction = AdamOp(eps=0.0)
        >>> mu, nu = torch.zeros(2), torch.zeros(2)
        >>> direction(mu, nu, torch.tensor([3.0, -0.2]), 1)[2]
        tensor([ 1.0000, -1.0000])
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
        """Return (mu', nu', direction) of one step.

        Args:
            mu: The first moment.
            nu: The second moment, like `mu`.
            updates: The gradient, like `mu`; None leaves the moments as they are.
            count: The number of the step, from 1.
        """
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
