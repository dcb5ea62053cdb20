# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.adamax`."""

from torchopt.optimizers.adamax import adamax

__all__ = ["adamax"]
