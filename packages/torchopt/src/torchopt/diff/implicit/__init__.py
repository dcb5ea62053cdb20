# SPDX-License-Identifier: Apache-2.0
"""Implicit differentiation: derivatives of a solution from the equation that it solves."""

from __future__ import annotations

from torchopt.diff.implicit.certificate import GradientReport
from torchopt.diff.implicit.decorator import (
    certified_grad,
    custom_fixed_point,
    custom_root,
    root_jvp,
    root_vjp,
)
from torchopt.diff.implicit.inner import Adaptation, Implicit
from torchopt.diff.implicit.nn import ImplicitMetaGradientModule
from torchopt.diff.implicit.root import ImplicitEngine, OptimalityError, OptimalityWarning

__all__ = [
    "Adaptation",
    "GradientReport",
    "Implicit",
    "ImplicitEngine",
    "ImplicitMetaGradientModule",
    "OptimalityError",
    "OptimalityWarning",
    "certified_grad",
    "custom_fixed_point",
    "custom_root",
    "root_jvp",
    "root_vjp",
]
