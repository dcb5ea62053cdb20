# SPDX-License-Identifier: Apache-2.0
"""Count the operations of torch while a rival runs, and the bytes that are alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _native_bytes() -> Callable[[], int]:
    """Return a function that returns the bytes in use of torchopt's kernels."""
    try:
        from torchopt.kernels import buffers
    except ImportError:  # another torchopt, or none
        return lambda: 0
    return lambda: buffers.usage().used


class Dispatched(TorchDispatchMode):
    """Counts operations, and the bytes allocated while it is active that are alive at once.

    These are the new storages that operations return, and the tensors of torchopt's kernels, which
    bypass the dispatcher. Their sum is read before and after every operation.

    Attributes:
        operations: Number of operations that reached the dispatcher.
        live: Number of bytes that are alive.
        peak: Largest number of bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.live = self.peak = 0
        self._seen: set[int] = set()
        self._native = _native_bytes()
        self._native_before = self._native()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self._look()
        given = {
            x.untyped_storage()._cdata
            for x in tree_leaves((args, kwargs or {}))
            if isinstance(x, Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._watch(x.untyped_storage())
        self._look()
        return out

    def _look(self) -> None:
        self.peak = max(self.peak, self.live + self._native() - self._native_before)

    def _watch(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(key)
        self.live += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
