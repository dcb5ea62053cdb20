# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.adamax`."""

from __future__ import annotations

from torchopt.optimizers.adamax import adamax

__all__ = ["adamax"]
