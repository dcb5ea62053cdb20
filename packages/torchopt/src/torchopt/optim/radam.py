# SPDX-License-Identifier: Apache-2.0
"""Where `RAdam` was published."""

from torchopt.optim import RAdam

__all__ = ["RAdam"]
