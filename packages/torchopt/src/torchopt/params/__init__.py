# SPDX-License-Identifier: Apache-2.0
"""The parameters of modules: their containers, snapshots of them, calls with others."""

from __future__ import annotations

from torchopt.params.functional import functional_call
from torchopt.params.second_order import SecondDerivatives, check_second_order

__all__ = ["SecondDerivatives", "check_second_order", "functional_call"]
