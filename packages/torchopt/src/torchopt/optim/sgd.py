# SPDX-License-Identifier: Apache-2.0
"""The published import path of `SGD`."""

from torchopt.optim import SGD

__all__ = ["SGD"]
