# SPDX-License-Identifier: Apache-2.0
"""Torch's operations on lists of tensors, one call for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "foreach_add",
    "foreach_add_",
    "foreach_copy_",
    "foreach_lerp",
    "foreach_mul",
    "foreach_norm",
]

#: Return the sums of two lists, `foreach_add(xs, ys, alpha=a)` that of x + a y.
foreach_add: Callable[..., Any] = torch._foreach_add

#: Add a list of tensors to another one in place.
foreach_add_: Callable[..., Any] = torch._foreach_add_

#: Copy a list of tensors into another one.
foreach_copy_: Callable[..., Any] = torch._foreach_copy_

#: Return x + w (y - x) for two lists and a number w.
foreach_lerp: Callable[..., Any] = torch._foreach_lerp

#: Return the products of a list of tensors with a number.
foreach_mul: Callable[..., Any] = torch._foreach_mul

#: Return the norms of a list of tensors, `foreach_norm(xs, inf)` the largest moduli.
foreach_norm: Callable[..., Any] = torch._foreach_norm
