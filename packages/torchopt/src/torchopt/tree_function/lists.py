# SPDX-License-Identifier: Apache-2.0
"""Sums of lists of tensors, maxima over batches, and a test for plain tensors."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.torch_internals import (
    any_watched,
    foreach_add,
    in_forward_mode,
    in_vmap_of_nothing,
    is_traced,
    is_transforming,
)
from torchopt.tree_function.modes import Tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "PLAIN",
    "add_lists",
    "are_plain",
    "are_unfollowed",
    "max_over_batch",
    "placed_like",
    "require_entries",
    "require_entries_of_vmaps",
]


class _AddLists(torch.autograd.Function):
    """Sums of pairs of tensors; nothing is saved for the derivative."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        return _foreach_add(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        # A sparse cotangent, as of an embedding, becomes dense for derivatives of earlier steps.
        dense = [c if c is None or c.layout is torch.strided else c.to_dense() for c in cotangents]
        return (*dense, *dense)


def add_lists(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Return the sums of tensors with equal shapes and devices; for use outside of transforms.

    `foreach_add` would save all its arguments for a derivative that does not need them.
    """
    out = list(first)
    graph = torch.is_grad_enabled()
    kept: list[int] = []
    plain: list[int] = []
    for i, (a, b) in enumerate(zip(first, second)):
        if not (graph and (a.requires_grad or b.requires_grad)):
            plain.append(i)
        elif a.dtype == b.dtype:
            kept.append(i)
        else:
            out[i] = a + b
    for indices, add in ((kept, _AddLists.apply), (plain, _foreach_add)):
        if indices:
            summed = add(*(role[i] for role in (first, second) for i in indices))
            for i, x in zip(indices, summed):
                out[i] = x
    return out


def _foreach_add(*tensors: Tensor) -> Tensors:
    half = len(tensors) // 2
    return tuple(foreach_add(tensors[:half], tensors[half:]))


PLAIN = (Tensor, torch.nn.Parameter)
"""The types whose memory contains their elements; that of a subclass may contain anything."""
_PLAIN = frozenset(PLAIN)


def are_plain(*roles: Iterable[Tensor]) -> bool:
    """Return whether torch's operations on lists can be used for these tensors.

    They cannot under transforms, in forward mode or while tracing, nor for subclasses.
    """
    return (
        not in_forward_mode()
        and not is_transforming()
        and not is_traced()
        and all(_PLAIN.issuperset(map(type, role)) for role in roles)
    )


def are_unfollowed(*roles: Sequence[Tensor]) -> bool:
    """Return whether these are plain tensors, and no graph follows them."""
    return are_plain(*roles) and not any_watched(itertools.chain(*roles))


def placed_like(old: Any, new: Any) -> Tensor:
    """Return `new` for writing into `old`; a DTensor gets the placements of `old`."""
    placements = getattr(old, "placements", None)
    if placements is not None and getattr(new, "placements", placements) != placements:
        new = new.redistribute(placements=placements)
    placed: Tensor = new
    return placed


def require_entries(size: int) -> None:
    """Raise for a vmap over a batch without entries, which iterations and factorisations lack."""
    if not size:
        raise ValueError(
            "a solver under torch.func.vmap: expected a batch of at least one entry, got one "
            "without entries; leave the call out for an empty batch."
        )


def require_entries_of_vmaps() -> None:
    """Raise inside a vmap over a batch without entries."""
    if is_transforming() and in_vmap_of_nothing():
        require_entries(0)


class _MaxOverBatch(torch.autograd.Function):
    """The identity; under vmap, the maximum over the entries of the batch."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        require_entries(info.batch_size)
        return max_over_batch(x.amax(in_dims[0])), None


def max_over_batch(x: Tensor) -> Tensor:
    """Return a 0-dim integer `x`, or the largest of the batch under vmap, as an unbatched tensor.

    A loop under vmap uses it to find out whether any entry of the batch has not finished.
    """
    if not is_transforming():
        return x
    largest: Tensor = _MaxOverBatch.apply(x)  # type: ignore[no-untyped-call]
    return largest
