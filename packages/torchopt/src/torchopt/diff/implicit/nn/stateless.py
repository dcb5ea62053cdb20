# SPDX-License-Identifier: Apache-2.0
"""Replace parameters and buffers of a module by other tensors."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchopt.params.swap import Swap, replace

__all__ = ["reparameterize", "reparametrize", "swap_state"]

NamedTensors = Mapping[str, Any] | Iterable[tuple[str, Any]]


def swap_state(
    module: nn.Module, named_tensors: NamedTensors, allow_missing: bool = False
) -> dict[str, Any]:
    """Replace tensors of a module, given by their dotted names.

    Args:
        module: The module; it is changed.
        named_tensors: The tensors by name: parameters, buffers or meta-parameters.
        allow_missing: Add a parameter for a name that the module does not have.

    Returns:
        The previous tensors by name; pass them to `swap_state` to restore them.

    Raises:
        KeyError: A name is unknown and `allow_missing` is False; then the module is as it was.
    """
    items = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    before: dict[str, Any] = {}
    try:
        for name, tensor in items:
            before.setdefault(name, replace(module, name, tensor, allow_missing))
    except BaseException:
        for name, tensor in reversed(before.items()):
            replace(module, name, tensor, allow_missing)
        raise
    # A module may be in several places: what was replaced last is restored first.
    return dict(reversed(before.items()))


@contextmanager
def reparametrize(
    module: nn.Module, named_tensors: NamedTensors, allow_missing: bool = False
) -> Generator[nn.Module]:
    """Replace tensors of a module within a `with` block; see `swap_state`.

    Other threads see the module unchanged. Activation checkpoints that were made inside the
    block are recomputed with the replaced tensors, even after the block.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> with reparametrize(net, {"weight": torch.tensor([[3.0]])}):
        ...     print(net(torch.ones(1)))
        tensor([3.])
    """
    with Swap(module, dict(named_tensors), allow_missing=allow_missing):
        yield module


reparameterize = reparametrize
