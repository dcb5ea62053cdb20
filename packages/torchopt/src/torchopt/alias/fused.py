# SPDX-License-Identifier: Apache-2.0
"""Native calls; see `torchopt.optimizers.native`."""

from torchopt.optimizers.native import Backend, with_backend

__all__ = ["Backend", "with_backend"]
