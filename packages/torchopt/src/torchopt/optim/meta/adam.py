# SPDX-License-Identifier: Apache-2.0
"""The published import path of `MetaAdam`."""

from torchopt.optim.meta import MetaAdam

__all__ = ["MetaAdam"]
