# SPDX-License-Identifier: Apache-2.0
"""The direction of an optimizer; see `torchopt.optimizers.adagrad`."""

from torchopt.optimizers.adagrad import ScaleByRssState, scale_by_rss

__all__ = ["ScaleByRssState", "scale_by_rss"]
