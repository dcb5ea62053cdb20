# SPDX-License-Identifier: Apache-2.0
"""One optimizer, one file: its state, its rule, the transformation `scale_by_x` and `x` itself."""

from __future__ import annotations

import torchopt.transform  # first, because it exports the transformations of these files
from torchopt.optimizers.adam import adam, adamw
from torchopt.optimizers.lion import lion

__all__ = ["adam", "adamw", "lion"]
