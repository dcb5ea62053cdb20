# SPDX-License-Identifier: Apache-2.0
"""Copies that take memory and time only when the original is written to.

torch copies the memory at the first access by an operation that may write. That includes the few
operations that read but do not say so, and `numpy()`. The original then gets new memory, and the
copy keeps the old one. Numpy arrays and other holders of a bare address would not follow, so
tensors that anything else refers to are not copied in this way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["address_of", "is_held_elsewhere", "is_unwritten", "lazy_copy", "storage_of"]


def lazy_copy(x: Tensor) -> Tensor | None:
    """Return a copy that shares the memory of a tensor until one of them is written to.

    Return None if that is impossible: the tensor is not a plain one on the CPU, anything else
    refers to its memory, or torch did not allocate it. It must require a gradient: of other
    tensors, `numpy()` and DLPack hand out addresses that nothing counts.
    """
    if not x.requires_grad or x.device.type != "cpu":
        return None
    if type(x) not in (Tensor, torch.nn.Parameter):
        return None
    if x.layout != torch.strided or x.is_conj() or x.is_neg():
        return None
    if is_held_elsewhere(x):
        return None
    with torch.no_grad():
        try:
            copy: Tensor = torch._lazy_clone(x)
        except RuntimeError:  # memory that is shared between processes, or of an array
            return None
    return copy


def is_unwritten(x: Tensor, copy: Tensor) -> bool:
    """Return whether a tensor and a copy by `lazy_copy` still share their memory."""
    return _is_shared(x) and address_of(x) == address_of(copy)


# They have no stubs.
_is_shared: Callable[[Tensor], bool] = getattr(torch._C, "_is_cow_tensor")  # noqa: B009

#: Return the address of a tensor's memory, without the copy that `data_ptr` makes.
address_of: Callable[[Tensor], int] = getattr(torch._C, "_data_address")  # noqa: B009


def storage_of(x: Tensor) -> int:
    """Return a number of the storage of a tensor, the same for its views, as long as it lives."""
    number: int = x.untyped_storage()._cdata
    return number


def is_held_elsewhere(x: Tensor) -> bool:
    """Return whether anything else refers to the memory of a tensor, such as a view or an array."""
    return _holders(x) > _holders_of_own_memory()


def _holders(x: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(storage_of(x))
    return count


@functools.cache
def _holders_of_own_memory() -> int:
    return _holders(torch.nn.Parameter(torch.zeros(2)))
