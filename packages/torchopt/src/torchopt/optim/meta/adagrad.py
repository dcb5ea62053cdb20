# SPDX-License-Identifier: Apache-2.0
"""The published import path of `MetaAdaGrad`."""

from torchopt.optim.meta import MetaAdaGrad, MetaAdagrad

__all__ = ["MetaAdaGrad", "MetaAdagrad"]
