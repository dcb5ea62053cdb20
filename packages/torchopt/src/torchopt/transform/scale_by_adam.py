# SPDX-License-Identifier: Apache-2.0
"""Adam's direction; see `torchopt.optimizers.adam`."""

from torchopt.optimizers.adam import ScaleByAdamState, scale_by_accelerated_adam, scale_by_adam

__all__ = ["ScaleByAdamState", "scale_by_accelerated_adam", "scale_by_adam"]
