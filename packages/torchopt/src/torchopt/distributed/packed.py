# SPDX-License-Identifier: Apache-2.0
"""Trees as bytes. Tensors of one kind are pickled together, which is faster than one by one."""

from __future__ import annotations

import contextlib
import gc
import math
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchopt.tree import tree_flatten, tree_unflatten

__all__ = ["pack", "unpack"]

_SHARED = 65536  # bytes of memory that small tensors of one kind may share


def pack(tree: Any) -> bytes:
    """Return a tree as bytes; its tensors are detached and copied to the CPU."""
    leaves, spec = tree_flatten(tree, none_is_leaf=True)
    kinds: dict[Any, list[int]] = {}
    for k, x in enumerate(leaves):
        if _is_plain(x):
            kinds.setdefault((x.dtype, x.shape, x.device), []).append(k)
        elif isinstance(x, Tensor):
            leaves[k] = x.detach().cpu()
    pieces = []
    for (dtype, shape, _), members in kinds.items():
        with torch.no_grad():
            whole = torch.stack([leaves[k] for k in members]).cpu()
        content: Any = whole.reshape(-1).view(torch.uint8).numpy()
        pieces.append((dtype, tuple(shape), members, content.tobytes()))
        for k in members:
            leaves[k] = None
    return pickle.dumps((spec, leaves, pieces), protocol=pickle.HIGHEST_PROTOCOL)


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor and x.layout is torch.strided and not x.is_quantized


def unpack(data: bytes) -> Any:
    """Return the tree that was packed."""
    with _without_collector():
        spec, leaves, pieces = pickle.loads(data)
        for dtype, shape, members, content in pieces:
            for k, x in zip(members, _parted(content, dtype, shape, len(members))):
                leaves[k] = x
        return tree_unflatten(spec, leaves)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Make many objects that are all kept, without a search for garbage among all others."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


def _parted(content: bytes, dtype: torch.dtype, shape: tuple[int, ...], count: int) -> Any:
    """Yield the tensors of one piece; each keeps at most about `_SHARED` bytes alive."""
    size = len(content) // count
    if size == 0:
        yield from (torch.empty(shape, dtype=dtype) for _ in range(count))
        return
    numel, together = math.prod(shape), max(1, _SHARED // size)
    for first in range(0, count, together):
        memory = bytearray(content[first * size : (first + together) * size])
        for start in range(0, len(memory), size):
            x = torch.frombuffer(memory, dtype=dtype, count=numel, offset=start)
            yield x if len(shape) == 1 else x.view(shape)
