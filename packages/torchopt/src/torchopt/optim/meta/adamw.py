# SPDX-License-Identifier: Apache-2.0
"""The published import path of `MetaAdamW`."""

from torchopt.optim.meta import MetaAdamW

__all__ = ["MetaAdamW"]
