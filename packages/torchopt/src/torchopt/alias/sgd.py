# SPDX-License-Identifier: Apache-2.0
"""See `torchopt.optimizers.sgd`."""

from torchopt.optimizers.sgd import sgd

__all__ = ["sgd"]
