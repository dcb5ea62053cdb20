# SPDX-License-Identifier: Apache-2.0
"""The direction of an optimizer; see `torchopt.optimizers.radam`."""

from torchopt.optimizers.radam import ScaleByRAdamState, scale_by_radam

__all__ = ["ScaleByRAdamState", "scale_by_radam"]
