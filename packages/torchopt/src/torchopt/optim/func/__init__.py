# SPDX-License-Identifier: Apache-2.0
"""The functional optimizer with a state of its own."""

from __future__ import annotations

from torchopt.optim.func.base import FuncOptimizer

__all__ = ["FuncOptimizer"]
