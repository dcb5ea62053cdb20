# SPDX-License-Identifier: Apache-2.0
"""Ways of differentiating through a computation: explicit, implicit and zero-order."""

from __future__ import annotations

from torchopt.diff import explicit, implicit, zero_order
from torchopt.diff.implicit import ImplicitMetaGradientModule
from torchopt.diff.zero_order.nn import ZeroOrderGradientModule

__all__ = [
    "ImplicitMetaGradientModule",
    "ZeroOrderGradientModule",
    "explicit",
    "implicit",
    "zero_order",
]
