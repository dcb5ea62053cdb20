# SPDX-License-Identifier: Apache-2.0
"""Where `AdaMax` was published."""

from __future__ import annotations

from torchopt.optim import AdaMax, Adamax

__all__ = ["AdaMax", "Adamax"]
