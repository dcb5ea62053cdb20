# SPDX-License-Identifier: Apache-2.0
"""The published import path of `MetaAdaMax`."""

from torchopt.optim.meta import MetaAdaMax, MetaAdamax

__all__ = ["MetaAdaMax", "MetaAdamax"]
