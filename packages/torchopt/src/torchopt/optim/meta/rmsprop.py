# SPDX-License-Identifier: Apache-2.0
"""Where `MetaRMSProp` was published."""

from torchopt.optim.meta import MetaRMSProp, MetaRMSprop

__all__ = ["MetaRMSProp", "MetaRMSprop"]
