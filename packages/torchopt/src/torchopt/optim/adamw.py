# SPDX-License-Identifier: Apache-2.0
"""The published import path of `AdamW`."""

from torchopt.optim import AdamW

__all__ = ["AdamW"]
