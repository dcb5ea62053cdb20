# SPDX-License-Identifier: Apache-2.0
"""Count the bytes of live tensors, operation by operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from torchopt.errors import KernelUnavailableError
from torchopt.kernels import buffers
from torchopt.torch_internals import TorchDispatchMode, is_zero_tensor
from torchopt.tree import tree_leaves, tree_map

__all__ = ["CountBytes"]


class CountBytes(TorchDispatchMode):
    """A context that counts the bytes of the tensors that are created in it and still alive.

    The count is exact and the same in each run, because it follows storages, not the allocator. The
    kernels of torchopt, which the dispatcher does not see, report how much they have allocated.

    Attributes:
        peak: The largest value that `now` had.

    Example:
        >>> import torch
        >>> with CountBytes() as count:
        ...     x = torch.ones(1024)  # float32
        ...     y = (x * 2).sum()
        ...     del x
        >>> count.peak, count.now
        (8196, 4)
    """

    def __init__(self, *known: Tensor) -> None:
        """Set up the count.

        Args:
            *known: Tensors whose memory is not counted, even if a view of them is created.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {x.untyped_storage()._cdata for x in known}
        self._alive: dict[int, Any] = {}
        self._seen = self.peak = 0
        self._before = _of_kernels()

    @property
    def now(self) -> int:
        """The number of bytes that are alive."""
        return self._seen + _of_kernels() - self._before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the tensors that it created."""
        self.peak = max(self.peak, self.now)
        tensors = _strided((args, kwargs))
        if any(map(is_zero_tensor, tensors)):
            # Tangents of constants. torch reads their memory here, which they do not have.
            args, kwargs = tree_map(_in_memory, args), tree_map(_in_memory, kwargs)
        given = {x.untyped_storage()._cdata for x in tensors}
        out = func(*args, **(kwargs or {}))
        for x in _strided(out):
            if x.untyped_storage()._cdata not in given:
                self._count(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        # Fake tensors and those on the meta device have a size and no memory.
        if key in self._alive or key in self._known or size == 0 or storage.device.type == "meta":
            return

        def gone(_: Any) -> None:
            self._alive.pop(key, None)
            self._seen -= size

        self._alive[key] = weakref.ref(storage, gone)
        self._seen += size


def _in_memory(x: Any) -> Any:
    return torch.zeros_like(x) if isinstance(x, Tensor) and is_zero_tensor(x) else x


def _strided(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout is torch.strided]


def _of_kernels() -> int:
    try:
        return buffers.usage().used
    except KernelUnavailableError:  # nothing is made by them
        return 0
