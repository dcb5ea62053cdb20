# SPDX-License-Identifier: Apache-2.0
"""Modules whose gradients come from implicit differentiation or from function values alone."""

from __future__ import annotations

from torchopt.diff.implicit.nn import (
    ImplicitMetaGradientModule,
    MetaGradientModule,
    reparameterize,
    reparametrize,
    swap_state,
)
from torchopt.diff.zero_order.nn import ZeroOrderGradientModule

__all__ = [
    "ImplicitMetaGradientModule",
    "MetaGradientModule",
    "ZeroOrderGradientModule",
    "reparameterize",
    "reparametrize",
    "swap_state",
]
