# SPDX-License-Identifier: Apache-2.0
"""Operations on lists of tensors by one call of torch for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "foreach_add",
    "foreach_add_",
    "foreach_copy_",
    "foreach_lerp",
    "foreach_mul",
    "foreach_norm",
    "same_forms",
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

_guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


def same_forms(like: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
    """Return a function that compares as many tensors with these: True only if all are alike.

    They are if types, shapes, strides, dtypes, devices and `requires_grad` are equal, and so are
    layouts, negative bits and conjugate bits, transforms and modes that see them. It returns False
    if one tensor appears twice.
    """
    guards = getattr(_guards, "TensorGuards", None)
    if guards is None:
        return lambda tensors: False
    check = guards(*like, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return lambda tensors: check(*tensors)
