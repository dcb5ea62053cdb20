# SPDX-License-Identifier: Apache-2.0
"""Trees as bytes, with tensors of a kind in one piece: pickling them one by one takes long."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor

from torchopt.tree import tree_flatten, tree_unflatten

__all__ = ["pack", "unpack"]


def pack(tree: Any) -> bytes:
    """Return a tree as bytes; its tensors without their graphs, on the CPU."""
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
    return type(x) is Tensor and x.layout == torch.strided and not x.is_quantized


def unpack(data: bytes) -> Any:
    """Return the tree that `pack` was given."""
    spec, leaves, pieces = pickle.loads(data)
    for dtype, shape, members, content in pieces:
        empty = torch.empty((len(members), *shape), dtype=dtype)
        whole = (
            torch.frombuffer(bytearray(content), dtype=dtype).view_as(empty) if content else empty
        )
        for k, x in zip(members, whole.unbind()):
            leaves[k] = x.clone()  # with memory of its own, as if it had come alone
    return tree_unflatten(spec, leaves)
