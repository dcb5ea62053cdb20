# SPDX-License-Identifier: Apache-2.0
"""Call modules with other parameters; the names are in the module where they were published."""

from __future__ import annotations

from torchopt.diff.implicit.nn import reparameterize, reparametrize, swap_state

__all__ = ["reparameterize", "reparametrize", "swap_state"]
