# SPDX-License-Identifier: Apache-2.0
"""Implicit differentiation: derivatives of solutions, from the equation that they solve."""

from __future__ import annotations

from torchopt.diff.implicit.decorator import custom_fixed_point, custom_root, root_jvp, root_vjp
from torchopt.diff.implicit.nn import ImplicitMetaGradientModule
from torchopt.diff.implicit.root import ImplicitEngine, OptimalityError, OptimalityWarning

__all__ = [
    "ImplicitEngine",
    "ImplicitMetaGradientModule",
    "OptimalityError",
    "OptimalityWarning",
    "custom_fixed_point",
    "custom_root",
    "root_jvp",
    "root_vjp",
]
