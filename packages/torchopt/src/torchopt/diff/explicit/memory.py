# SPDX-License-Identifier: Apache-2.0
"""Count the bytes of live tensors, operation by operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.tree import tree_leaves

__all__ = ["CountBytes"]


class CountBytes(TorchDispatchMode):
    """A context that counts the bytes of the tensors that are created in it and still alive.

    The count is exact and the same in each run, because it follows storages, not the allocator.

    Attributes:
        now: The number of bytes that are alive.
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
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count the tensors that it created."""
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.layout is torch.strided:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive or key in self._known or size == 0:
            return

        def gone(_: Any) -> None:
            self._alive.pop(key, None)
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
