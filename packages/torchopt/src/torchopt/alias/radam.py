# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.radam`."""

from torchopt.optimizers.radam import radam

__all__ = ["radam"]
