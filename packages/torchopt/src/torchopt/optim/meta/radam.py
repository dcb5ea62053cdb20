# SPDX-License-Identifier: Apache-2.0
"""Where `MetaRAdam` was published."""

from torchopt.optim.meta import MetaRAdam

__all__ = ["MetaRAdam"]
