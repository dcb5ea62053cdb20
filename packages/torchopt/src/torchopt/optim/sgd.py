# SPDX-License-Identifier: Apache-2.0
"""Where `SGD` was published."""

from torchopt.optim import SGD

__all__ = ["SGD"]
