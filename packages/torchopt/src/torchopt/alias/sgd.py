# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.sgd`."""

from __future__ import annotations

from torchopt.optimizers.sgd import sgd

__all__ = ["sgd"]
