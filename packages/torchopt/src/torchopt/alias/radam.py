# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.radam`."""

from __future__ import annotations

from torchopt.optimizers.radam import radam

__all__ = ["radam"]
