# SPDX-License-Identifier: Apache-2.0
"""The published import path of `Adam`."""

from torchopt.optim import Adam

__all__ = ["Adam"]
