# SPDX-License-Identifier: Apache-2.0
"""The published import path of `RMSProp`."""

from torchopt.optim import RMSProp, RMSprop

__all__ = ["RMSProp", "RMSprop"]
