# SPDX-License-Identifier: Apache-2.0
"""The direction of an optimizer; see `torchopt.optimizers.adadelta`."""

from torchopt.optimizers.adadelta import ScaleByAdadeltaState, scale_by_adadelta

__all__ = ["ScaleByAdadeltaState", "scale_by_adadelta"]
