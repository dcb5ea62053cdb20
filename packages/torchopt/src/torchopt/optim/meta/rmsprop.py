# SPDX-License-Identifier: Apache-2.0
"""The published import path of `MetaRMSProp`."""

from torchopt.optim.meta import MetaRMSProp, MetaRMSprop

__all__ = ["MetaRMSProp", "MetaRMSprop"]
