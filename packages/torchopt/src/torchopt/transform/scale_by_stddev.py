# SPDX-License-Identifier: Apache-2.0
"""The direction of an optimizer; see `torchopt.optimizers.rmsprop`."""

from torchopt.optimizers.rmsprop import ScaleByRStdDevState, scale_by_stddev

__all__ = ["ScaleByRStdDevState", "scale_by_stddev"]
