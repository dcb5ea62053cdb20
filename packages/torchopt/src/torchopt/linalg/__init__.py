# SPDX-License-Identifier: Apache-2.0
"""Linear algebra on trees: conjugate gradients and the Neumann series."""

from __future__ import annotations

from torchopt.linalg.cg import cg
from torchopt.linalg.ns import ns, ns_inv

__all__ = ["cg", "ns", "ns_inv"]
