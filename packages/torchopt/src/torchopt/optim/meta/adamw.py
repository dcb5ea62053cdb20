# SPDX-License-Identifier: Apache-2.0
"""Where `MetaAdamW` was published."""

from __future__ import annotations

from torchopt.optim.meta import MetaAdamW

__all__ = ["MetaAdamW"]
