# SPDX-License-Identifier: Apache-2.0
"""Trees as bytes, with all tensors of a type in one piece: pickling them one by one takes long."""

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
            kinds.setdefault(x.dtype, []).append(k)
        elif isinstance(x, Tensor):
            leaves[k] = x.detach().cpu()
    pieces = []
    for dtype, members in kinds.items():
        tensors = [leaves[k].detach() for k in members]
        whole = torch.cat([x.reshape(-1) for x in tensors]).cpu()
        content: Any = whole.view(torch.uint8).numpy()
        pieces.append((dtype, members, [x.shape for x in tensors], content.tobytes()))
        for k in members:
            leaves[k] = None
    shapes = [(d, m, [tuple(s) for s in sizes], c) for d, m, sizes, c in pieces]
    return pickle.dumps((spec, leaves, shapes), protocol=pickle.HIGHEST_PROTOCOL)


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor and x.layout == torch.strided and not x.is_quantized


def unpack(data: bytes) -> Any:
    """Return the tree that `pack` was given."""
    spec, leaves, pieces = pickle.loads(data)
    for dtype, members, shapes, content in pieces:
        whole = torch.frombuffer(bytearray(content) or bytearray(8), dtype=dtype)
        sizes = [torch.Size(shape).numel() for shape in shapes]
        for k, shape, x in zip(members, shapes, whole[: sum(sizes)].split(sizes)):
            # Each with memory of its own, as if it had come alone.
            leaves[k] = x.view(shape).clone()
    return tree_unflatten(spec, leaves)
