# SPDX-License-Identifier: Apache-2.0
"""The base of modules with meta-parameters, under the published module's name."""

from __future__ import annotations

from torchopt.diff.implicit.nn import MetaGradientModule

__all__ = ["MetaGradientModule"]
