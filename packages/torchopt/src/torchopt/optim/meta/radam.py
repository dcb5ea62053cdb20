# SPDX-License-Identifier: Apache-2.0
"""The published import path of `MetaRAdam`."""

from torchopt.optim.meta import MetaRAdam

__all__ = ["MetaRAdam"]
