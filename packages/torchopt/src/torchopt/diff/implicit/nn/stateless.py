# SPDX-License-Identifier: Apache-2.0
"""Put other tensors in the place of the parameters and buffers of a module."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["reparameterize", "reparametrize", "swap_state"]

NamedTensors = Mapping[str, Any] | Iterable[tuple[str, Any]]

#: What stands for a tensor that a module did not have.
MISSING = object()


def _swap(module: nn.Module, name: str, tensor: Any, allow_missing: bool) -> Any:
    path, _, key = name.rpartition(".")
    owner: Any = module
    for part in path.split(".") if path else ():
        owner = getattr(owner, part)
    for container in ("_parameters", "_buffers", "_meta_parameters"):
        tensors = owner.__dict__.get(container, {})
        if key in tensors:
            old = tensors[key]
            if tensor is MISSING:
                del tensors[key]
            else:
                tensors[key] = tensor
            return old
    if key in owner.__dict__ and isinstance(owner.__dict__[key], Tensor):
        old = owner.__dict__[key]
        owner.__dict__[key] = tensor
        return old
    if not allow_missing:
        raise KeyError(f"{name}: {type(module).__name__} has no parameter or buffer of this name")
    if tensor is not MISSING:
        owner._parameters[key] = tensor
    return MISSING


def swap_state(
    module: nn.Module, named_tensors: NamedTensors, allow_missing: bool = False
) -> dict[str, Any]:
    """Put tensors into a module by their dotted names.

    Args:
        module: The module; it is changed.
        named_tensors: The tensors by name: parameters, buffers or meta-parameters.
        allow_missing: Add a parameter for a name that the module does not have.

    Returns:
        What was there before, by name; pass it to `swap_state` to put it back.

    Raises:
        KeyError: A name is unknown and `allow_missing` is False.
    """
    items = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
    return {name: _swap(module, name, tensor, allow_missing) for name, tensor in items}


@contextmanager
def reparametrize(
    module: nn.Module, named_tensors: NamedTensors, allow_missing: bool = False
) -> Generator[nn.Module]:
    """Put tensors into a module for the time of a `with` block; see `swap_state`.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> with reparametrize(net, {"weight": torch.tensor([[3.0]])}):
        ...     print(net(torch.ones(1)))
        tensor([3.])
    """
    items = dict(named_tensors)
    swapped: dict[str, Any] = {}
    try:
        for name, tensor in items.items():
            swapped.update(swap_state(module, {name: tensor}, allow_missing))
        yield module
    finally:
        swap_state(module, swapped, allow_missing=True)


reparameterize = reparametrize
