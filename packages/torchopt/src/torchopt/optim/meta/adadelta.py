# SPDX-License-Identifier: Apache-2.0
"""Where `MetaAdaDelta` was published."""

from torchopt.optim.meta import MetaAdaDelta, MetaAdadelta

__all__ = ["MetaAdaDelta", "MetaAdadelta"]
