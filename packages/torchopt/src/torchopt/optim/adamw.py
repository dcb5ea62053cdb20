# SPDX-License-Identifier: Apache-2.0
"""Where `AdamW` was published."""

from torchopt.optim import AdamW

__all__ = ["AdamW"]
