# SPDX-License-Identifier: Apache-2.0
"""Where `AdamW` was published."""

from __future__ import annotations

from torchopt.optim import AdamW

__all__ = ["AdamW"]
