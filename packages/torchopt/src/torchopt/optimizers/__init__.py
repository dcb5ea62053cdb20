# SPDX-License-Identifier: Apache-2.0
"""The optimizers, one per file: its state, its rule, the transformation `scale_by_x`, and `x`.

`torchopt.index` lists them.
"""

from __future__ import annotations

import torchopt.transform  # first: it imports none of these files
from torchopt.index import OPTIMIZERS, exported

globals().update((name, exported()[name]) for name in OPTIMIZERS)

__all__ = sorted(OPTIMIZERS)  # noqa: PLE0605 - the names of the index
