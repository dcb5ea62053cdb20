# SPDX-License-Identifier: Apache-2.0
"""Layer-wise trust ratios."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.transform.base import LeafRule, transformation_of
from torchopt.transform.norm import scaled
from torchopt.transform.validate import Hyper, at_least_zero

__all__ = ["scale_by_trust_ratio"]


@dataclass(frozen=True)
class ScaleByTrustRatio(LeafRule):
    """u = coefficient |p| / (|g| + eps) g, tensor by tensor."""

    coefficient: Hyper = at_least_zero("coefficient value", 1.0)
    eps: Hyper = at_least_zero("epsilon value", 0.0)
    reads_params: ClassVar[bool] = True
    takes_directions: ClassVar[bool] = True

    def moved(self, g: Tensor, p: Any) -> Tensor:
        of_p, of_g = scaled(p), scaled(g)
        usable = (of_p.norm > 0) & (of_g.norm > 0)
        divisor = torch.where(usable, of_g.norm + self.eps / of_g.size, 1.0)
        ratio = self.coefficient * (of_p.size * of_p.norm) / divisor
        return torch.where(usable, of_g.unit * ratio, g)


@transformation_of(ScaleByTrustRatio)
def scale_by_trust_ratio() -> None:
    """Return the transformation u = coefficient |p| / (|g| + eps) g, tensor by tensor.

    The norms are those of each tensor. If one of them is zero, u = g.

    Args:
        coefficient: The trust coefficient, >= 0.
        eps: Added to the norm of the update, >= 0.

    References:
        Y. You, I. Gitman, B. Ginsburg, Large Batch Training of Convolutional Networks, 2017,
        https://arxiv.org/abs/1708.03888, equation 6.
    """
