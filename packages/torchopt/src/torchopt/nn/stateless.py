# SPDX-License-Identifier: Apache-2.0
"""Modules run with other parameters, under the published module's name."""

from __future__ import annotations

from torchopt.diff.implicit.nn import reparameterize, reparametrize, swap_state

__all__ = ["reparameterize", "reparametrize", "swap_state"]
