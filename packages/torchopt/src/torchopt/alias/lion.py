# SPDX-License-Identifier: Apache-2.0
"""Lion; see `torchopt.optimizers.lion`."""

from __future__ import annotations

from torchopt.optimizers.lion import lion

__all__ = ["lion"]
