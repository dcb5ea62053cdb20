# SPDX-License-Identifier: Apache-2.0
"""Where `MetaAdaMax` was published."""

from torchopt.optim.meta import MetaAdaMax, MetaAdamax

__all__ = ["MetaAdaMax", "MetaAdamax"]
