# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.rmsprop`."""

from __future__ import annotations

from torchopt.optimizers.rmsprop import rmsprop

__all__ = ["rmsprop"]
