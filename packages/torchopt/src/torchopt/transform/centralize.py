# SPDX-License-Identifier: Apache-2.0
"""Gradient centralization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from torchopt.transform.base import LeafRule, transformation_of

__all__ = ["centralize"]


@dataclass(frozen=True)
class Centralize(LeafRule):
    """u = g - mean of g over all dimensions but the first."""

    complex_numbers: ClassVar[str] = "whole"

    def moved(self, g: Tensor, p: Any) -> Tensor:
        return g - g.mean(dim=tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g


@transformation_of(Centralize)
def centralize() -> None:
    """Return the transformation that subtracts from the gradient of each output its mean.

    The update is u = g - mean(g), with the mean over all dimensions but the first. Tensors with one
    dimension or none are returned unchanged.

    References:
        H. Yong, J. Huang, X. Hua, L. Zhang, Gradient Centralization, 2020,
        https://arxiv.org/abs/2004.01461, equation 1.

    Example:
        >>> import torch
        >>> centralize().update(torch.tensor([[1.0, 3.0]]), ())[0]
        tensor([[-1.,  1.]])
    """
