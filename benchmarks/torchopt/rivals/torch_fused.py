# SPDX-License-Identifier: Apache-2.0
"""torch.optim with `fused=True`."""

from __future__ import annotations

import functools

from benchmarks.torchopt.rivals import torch_optim

DISTRIBUTIONS = torch_optim.DISTRIBUTIONS
library = torch_optim.library

in_place = functools.partial(torch_optim.in_place, fused=True)
