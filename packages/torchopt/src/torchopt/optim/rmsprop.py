# SPDX-License-Identifier: Apache-2.0
"""Where `RMSProp` was published."""

from torchopt.optim import RMSProp, RMSprop

__all__ = ["RMSProp", "RMSprop"]
