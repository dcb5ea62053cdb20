# SPDX-License-Identifier: Apache-2.0
"""Where `Adam` was published."""

from torchopt.optim import Adam

__all__ = ["Adam"]
