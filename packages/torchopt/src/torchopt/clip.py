# SPDX-License-Identifier: Apache-2.0
"""Clip gradients by their global norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.transform.base import LeafRule, as_transformation

__all__ = ["clip_grad_norm"]


@dataclass(frozen=True)
class ClipGradNorm(LeafRule):
    """u = g * min(1, max_norm / (norm of all g + 1e-6))."""

    max_norm: float
    norm_type: float
    error_if_nonfinite: bool

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the gradients, scaled together."""
        if not grads:
            return grads, state
        # The coefficient is a constant for differentiation, on the device all along.
        device = grads[0].device
        norms = [torch.linalg.vector_norm(g.detach(), self.norm_type).to(device) for g in grads]
        total = torch.linalg.vector_norm(torch.stack(norms), self.norm_type)
        if self.error_if_nonfinite and not bool(torch.isfinite(total)):
            raise RuntimeError(
                f"The total norm of order {self.norm_type} for gradients from `parameters` is "
                "non-finite, so it "
                "cannot be clipped. To disable this error and scale the gradients by the "
                "non-finite norm anyway, "
                "set `error_if_nonfinite=False`"
            )
        coefficient = (self.max_norm / (total + 1e-6)).clamp(max=1.0)
        return [g * coefficient.to(device=g.device, dtype=g.dtype) for g in grads], state


def clip_grad_norm(
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
) -> GradientTransformation:
    """Return the transformation that scales all gradients so that their joint norm is at most
    `max_norm`.

    The coefficient min(1, max_norm / (norm + 1e-6)) is a constant for differentiation.

    Args:
        max_norm: The largest norm.
        norm_type: Order of the norm; `"inf"` or `math.inf` for the largest absolute value.
        error_if_nonfinite: Raise when the norm is NaN or infinite; this waits for the device.

    Raises:
        RuntimeError: From `update`, with `error_if_nonfinite`, when the norm is not finite.

    Example:
        >>> clip = clip_grad_norm(1.0)
        >>> grads = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> clip.update(grads, clip.init(grads))[0]
        {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    rule = ClipGradNorm(float(max_norm), float(norm_type), error_if_nonfinite)
    return as_transformation(rule, already_flattened=False)
