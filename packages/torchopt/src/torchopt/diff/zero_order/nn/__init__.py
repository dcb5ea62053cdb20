# SPDX-License-Identifier: Apache-2.0
"""Modules whose gradient is estimated from their values."""

from __future__ import annotations

from torchopt.diff.zero_order.nn.module import ZeroOrderGradientModule

__all__ = ["ZeroOrderGradientModule"]
