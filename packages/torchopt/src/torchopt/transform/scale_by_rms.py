# SPDX-License-Identifier: Apache-2.0
"""The direction of an optimizer; see `torchopt.optimizers.rmsprop`."""

from torchopt.optimizers.rmsprop import ScaleByRmsState, scale_by_rms

__all__ = ["ScaleByRmsState", "scale_by_rms"]
