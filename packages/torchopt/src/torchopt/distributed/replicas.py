# SPDX-License-Identifier: Apache-2.0
"""The tensors of which every rank has a copy: parameters, also frozen ones, and buffers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from torchopt.distributed.before import parts_of

__all__ = ["compared", "copied", "leaves_of"]

_COMPARED = 64 * 2**20  # bytes; frozen parameters of more than this in total are not compared


def leaves_of(held: Any) -> Iterable[Any]:
    """Return the parameters of a module; anything else as it is."""
    if not isinstance(held, nn.Module):
        return (held,)
    kind = type(held)
    if (kind.parameters, kind.named_parameters) != (
        nn.Module.parameters,
        nn.Module.named_parameters,
    ):
        return held.parameters()
    return [x for part in parts_of([held]) for x in part._parameters.values()]


def copied(held: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that all ranks copy from the first one, each once.

    Args:
        held: Modules and leaves.
    """
    found = [
        x
        for each in held
        for x in leaves_of(each)
        if isinstance(x, Tensor) and (x.requires_grad or _is_plain(x))
    ]
    found += [b for part in _parts(held) for b in part._buffers.values() if _is_dense(b)]
    return [*dict.fromkeys(found)]


def compared(params: Sequence[Tensor], held: Sequence[Any], *, only_shards: bool) -> list[Tensor]:
    """Return the tensors that have to remain equal on all ranks.

    Buffers that are not saved may differ: they are caches.

    Args:
        params: The parameters that are differentiated.
        held: Modules and leaves.
        only_shards: Leave out frozen parameters that are no DTensors. `fully_shard` makes whole
            ones, which live only as long as they are used.
    """
    frozen = [
        x
        for each in held
        for x in leaves_of(each)
        if _is_plain(x) and not x.requires_grad and (hasattr(x, "to_local") or not only_shards)
    ]
    if sum(x.numel() * x.element_size() for x in frozen) > _COMPARED:
        frozen = []
    buffers = [
        b
        for part in _parts(held)
        for name, b in part._buffers.items()
        if name not in part._non_persistent_buffers_set and _is_dense(b)
    ]
    return [*params, *dict.fromkeys(frozen + buffers)]


def _parts(held: Sequence[Any]) -> list[nn.Module]:
    return parts_of(x for x in held if isinstance(x, nn.Module))


def _is_dense(x: Any) -> TypeGuard[Tensor]:
    """Return whether a leaf is a tensor that holds all its numbers."""
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta


def _is_plain(x: Any) -> bool:
    """Return whether it can be sent as well: others may consist of several tensors."""
    is_known = hasattr(x, "to_local") or type(x) in (Tensor, nn.Parameter)
    return is_known and _is_dense(x)
