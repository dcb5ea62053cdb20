# SPDX-License-Identifier: Apache-2.0
"""AdamW; see `torchopt.optimizers.adam`."""

from torchopt.optimizers.adam import adamw

__all__ = ["adamw"]
