# SPDX-License-Identifier: Apache-2.0
"""Where `MetaAdaGrad` was published."""

from torchopt.optim.meta import MetaAdaGrad, MetaAdagrad

__all__ = ["MetaAdaGrad", "MetaAdagrad"]
