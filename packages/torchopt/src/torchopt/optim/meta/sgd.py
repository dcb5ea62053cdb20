# SPDX-License-Identifier: Apache-2.0
"""Where `MetaSGD` was published."""

from torchopt.optim.meta import MetaSGD

__all__ = ["MetaSGD"]
