# SPDX-License-Identifier: Apache-2.0
"""The published import path of `MetaSGD`."""

from torchopt.optim.meta import MetaSGD

__all__ = ["MetaSGD"]
