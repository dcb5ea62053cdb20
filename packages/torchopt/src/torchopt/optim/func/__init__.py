# SPDX-License-Identifier: Apache-2.0
"""The functional optimizer that keeps its state."""

from torchopt.optim.func.base import FuncOptimizer

__all__ = ["FuncOptimizer"]
