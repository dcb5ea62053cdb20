# SPDX-License-Identifier: Apache-2.0
"""Implicit differentiation: derivatives of a solution from the equation that it solves.

| module | contents |
|---|---|
| `decorator` | `custom_root`, `custom_fixed_point`, `certified_grad`, `root_vjp`, `root_jvp` |
| `inner` | `Implicit`, the engine for inner problems; `Adaptation` |
| `nn` | `ImplicitMetaGradientModule` |
| `root`, `settings` | `ImplicitEngine`, which the others use, and its fields |
| `equation` | the residual and its Jacobian, on vectors |
| `rule` | the derivatives of a solution |
| `slope` | gradients whose derivative comes from differences |
| `certificate` | the error of a gradient |
"""

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
