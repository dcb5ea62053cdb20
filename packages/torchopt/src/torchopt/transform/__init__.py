# SPDX-License-Identifier: Apache-2.0
"""Transformations from gradients to updates, one per file."""

from __future__ import annotations

import importlib

from torchopt.index import OPTIMIZERS, PUBLISHED, exported
from torchopt.transform import utils as utils

# First the modules of the published package, because the functions below replace their names.
for _home in dict.fromkeys(PUBLISHED.values()):
    if _home.startswith(__name__):
        importlib.import_module(_home)

# The functions that have a file of their own name, with their states.
_FILES = (
    *("accumulate", "add_decayed_weights", "add_noise", "apply_if_finite", "cautious"),
    *("centralize", "compensated", "ema", "freeze", "galore", "in_8_bits", "in_precision"),
    *("inject_hyperparams", "lookahead", "masked", "nan_to_num", "orthogonalize", "partition"),
    *("sam", "scale", "scale_by_schedule", "scale_by_trust_ratio"),
)
for _file in _FILES:
    _module = importlib.import_module(f"{__name__}.{_file}")
    globals().update((name, getattr(_module, name)) for name in _module.__all__)

# The rules of optimizers, which use the modules above.
globals().update({k: v for k, v in exported().items() if k not in OPTIMIZERS})

__all__ = [*_FILES]  # noqa: PLE0604
__all__ += [name for name in exported() if name not in OPTIMIZERS and name[0].islower()]
