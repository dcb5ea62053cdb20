# SPDX-License-Identifier: Apache-2.0
"""The base class of modules with meta-parameters, in the module where it was published."""

from __future__ import annotations

from torchopt.diff.implicit.nn import MetaGradientModule

__all__ = ["MetaGradientModule"]
