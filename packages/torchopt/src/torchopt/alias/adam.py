# SPDX-License-Identifier: Apache-2.0
"""Adam; see `torchopt.optimizers.adam`."""

from torchopt.optimizers.adam import adam

__all__ = ["adam"]
