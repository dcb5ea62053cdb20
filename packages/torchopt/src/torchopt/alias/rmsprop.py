# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.rmsprop`."""

from torchopt.optimizers.rmsprop import rmsprop

__all__ = ["rmsprop"]
