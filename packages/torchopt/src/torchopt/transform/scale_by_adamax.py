# SPDX-License-Identifier: Apache-2.0
"""The direction of an optimizer; see `torchopt.optimizers.adamax`."""

from torchopt.optimizers.adamax import ScaleByAdamaxState, scale_by_adamax

__all__ = ["ScaleByAdamaxState", "scale_by_adamax"]
