# SPDX-License-Identifier: Apache-2.0
"""Gradients of embeddings with `sparse=True`: only the rows that were looked up are sent.

A sum over the ranks is sparse if every gradient in it is, like a sum over tasks in one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from torchopt.distributed.group import Group
from torchopt.distributed.signature import gradient_dtype

__all__ = ["added", "is_sparse", "sparse_positions", "summed"]


def sparse_positions(modules: Iterable[nn.Module], params: Sequence[Tensor]) -> list[int]:
    """Return the positions of parameters that are embedding tables with sparse gradients."""
    tables = {
        id(part.weight)
        for module in modules
        for part in module.modules()
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse
    }
    return [k for k, p in enumerate(params) if id(p) in tables] if tables else []


def is_sparse(grad: Tensor | None) -> bool:
    """Return whether a gradient is a sparse tensor with dense rows."""
    return grad is not None and grad.is_sparse and grad.sparse_dim() == 1


def summed(
    group: Group, p: Tensor, grad: Tensor | None, sparse: bool, name: str, limit: float
) -> Tensor:
    """Return the sum of a gradient over the ranks; all ranks call this.

    Args:
        group: The ranks.
        p: The parameter.
        grad: The gradient on this rank; None: this rank does not use the parameter.
        sparse: Whether the gradients are sparse on all ranks.
        name: What the sum is for.
        limit: Seconds that other ranks may take.
    """
    if not sparse:
        dense = torch.zeros_like(p, dtype=gradient_dtype(p), memory_format=torch.contiguous_format)
        return group.sum_(dense if grad is None else dense + grad, name, limit)
    if grad is None:
        rows = torch.zeros(0, dtype=torch.int64, device=p.device)
        values = p.detach()[:0].to(gradient_dtype(p))
    else:
        grad = grad.coalesce()
        rows, values = grad.indices()[0], grad.values()
    sizes = group.gather(torch.tensor([len(rows)], device=group.device), name, limit)
    most = int(sizes.max())
    parts = []
    for x in (rows, values):
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: len(x)] = x
        everyone = group.gather(padded, name, limit)
        parts.append(torch.cat([part[:n] for part, n in zip(everyone, sizes.flatten().tolist())]))
    return torch.sparse_coo_tensor(parts[0][None], parts[1], p.shape).coalesce()


def added(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of two gradients, each dense or sparse."""
    return right + left if left.is_sparse and not right.is_sparse else left + right
