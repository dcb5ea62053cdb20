# SPDX-License-Identifier: Apache-2.0
"""The published import path of `MetaAdaDelta`."""

from torchopt.optim.meta import MetaAdaDelta, MetaAdadelta

__all__ = ["MetaAdaDelta", "MetaAdadelta"]
