# SPDX-License-Identifier: Apache-2.0
"""Where `MetaAdam` was published."""

from torchopt.optim.meta import MetaAdam

__all__ = ["MetaAdam"]
