# SPDX-License-Identifier: Apache-2.0
"""The published import path of `RAdam`."""

from torchopt.optim import RAdam

__all__ = ["RAdam"]
