# SPDX-License-Identifier: Apache-2.0
"""Where `MetaAdamW` was published."""

from torchopt.optim.meta import MetaAdamW

__all__ = ["MetaAdamW"]
