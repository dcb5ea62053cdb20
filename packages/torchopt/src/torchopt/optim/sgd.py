# SPDX-License-Identifier: Apache-2.0
"""Where `SGD` was published."""

from __future__ import annotations

from torchopt.optim import SGD

__all__ = ["SGD"]
