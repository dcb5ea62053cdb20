# SPDX-License-Identifier: Apache-2.0
"""Modules with implicit gradients."""

from __future__ import annotations

from torchopt.diff.implicit.nn.meta_module import MetaGradientModule
from torchopt.diff.implicit.nn.module import ImplicitMetaGradientModule
from torchopt.diff.implicit.nn.stateless import reparameterize, reparametrize, swap_state

__all__ = [
    "ImplicitMetaGradientModule",
    "MetaGradientModule",
    "reparameterize",
    "reparametrize",
    "swap_state",
]
