# SPDX-License-Identifier: Apache-2.0
"""Where `RMSProp` was published."""

from __future__ import annotations

from torchopt.optim import RMSProp, RMSprop

__all__ = ["RMSProp", "RMSprop"]
