# SPDX-License-Identifier: Apache-2.0
"""Where `MetaRAdam` was published."""

from __future__ import annotations

from torchopt.optim.meta import MetaRAdam

__all__ = ["MetaRAdam"]
