# SPDX-License-Identifier: Apache-2.0
"""The parameters of modules: containers, snapshots, calls with other parameters, checks."""

from __future__ import annotations

from torchopt.params.functional import functional_call
from torchopt.params.second_order import SecondDerivatives, check_second_order

__all__ = ["SecondDerivatives", "check_second_order", "functional_call"]
