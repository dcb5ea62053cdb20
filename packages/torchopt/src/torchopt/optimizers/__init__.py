# SPDX-License-Identifier: Apache-2.0
"""The optimizers, one per file: its state, its rule, the transformation `scale_by_x`, and `x`.

`torchopt.index` lists them, and `torchopt.alias` has them all.
"""

import torchopt.transform  # first: it imports none of these files
