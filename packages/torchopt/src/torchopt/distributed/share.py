# SPDX-License-Identifier: Apache-2.0
"""Values that are sent once for many calls, and arguments as a remote function receives them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from torchopt.tree import tree_leaves, tree_map, tree_structure

__all__ = ["Shared", "digest", "received", "share", "tensors_of"]

T = TypeVar("T")


class Shared(Generic[T]):
    """A value that remote calls refer to instead of sending it each time; see `share`.

    Attributes:
        value: The module or tree of tensors.
    """

    def __init__(self, value: T) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return _unwrapped, (self.value,)

    def __repr__(self) -> str:
        return f"share({self.value!r})"


def _unwrapped(value: T) -> T:
    return value


def share(value: T) -> Shared[T]:
    """Return a reference to a module or a tree of tensors, to be passed to remote calls.

    The called function receives the value itself. Partitioners repeat the value instead of
    splitting its tensors. Its contents are sent once for each version, and gradients flow back to
    its tensors, including the parameters of a module. A module that is passed without `share` is
    also sent once for each version, but its parameters arrive as new parameters without a
    connection to those of the caller. The tensors may change between calls, in place or not: each
    call sees the contents at the time of the call.

    Args:
        value: A module, or a tree of tensors.

    Example:
        >>> import torchopt.distributed as todist
        >>> double = todist.parallelize(todist.batch_partitioner, todist.sum_reducer)(
        ...     lambda w, x: (w * x).sum())
        >>> w = torch.tensor(2.0, requires_grad=True)
        >>> double(todist.share(w), torch.arange(4.0))
        tensor(12., grad_fn=...)
    """
    return Shared(value)


def received(tree: Any, *, connected: bool) -> Any:
    """Return arguments as a remote function would receive them, for one that runs here.

    Tensors and modules are copied, so the function cannot change those of the caller. Gradients
    flow back through the copies of tensors.

    Args:
        tree: The arguments.
        connected: Whether gradients reach the parameters of modules that are not shared. With
            remote calls they do not.
    """
    memo: dict[int, Any] = {}

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            return _copied(leaf.value, memo, connected=True)
        return _copied(leaf, memo, connected=connected)

    return tree_map(one, tree, none_is_leaf=True)


def _copied(value: Any, memo: dict[int, Any], *, connected: bool) -> Any:
    """Return a module, or a tree of tensors and modules, as `received` says."""
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.clone() if value.requires_grad else value.detach().clone()
        return memo[id(value)]
    if not isinstance(value, nn.Module):
        if tree_structure(value, none_is_leaf=True).is_leaf():
            return value
        return tree_map(lambda x: _copied(x, memo, connected=connected), value, none_is_leaf=True)
    own = dict(memo)  # a parameter that is also an argument of its own is copied twice
    for x in tensors_of(value):
        if isinstance(x, nn.Parameter) and not connected:
            own[id(x)] = nn.Parameter(x.detach().clone(), x.requires_grad)
        elif id(x) not in memo:
            own[id(x)] = memo[id(x)] = x.clone() if x.requires_grad else _like(x)
    return copy.deepcopy(value, own)


def _like(x: Tensor) -> Tensor:
    copy_ = x.detach().clone()
    return nn.Parameter(copy_, requires_grad=False) if isinstance(x, nn.Parameter) else copy_


def digest(x: Tensor) -> bytes:
    """Return a hash, 16 bytes, of dtype, shape and content of a tensor on the CPU."""
    h = hashlib.blake2b(f"{x.dtype}{tuple(x.shape)}".encode(), digest_size=16)
    plain = x.detach().contiguous().resolve_conj().resolve_neg()
    content: Any = plain.reshape(-1).view(torch.uint8).numpy()
    h.update(content)
    return h.digest()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a tree and of the modules in it."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, nn.Module):
            for module in leaf.modules():
                for container in (module._parameters, module._buffers):
                    yield from (x for x in container.values() if x is not None)
        elif isinstance(leaf, Tensor):
            yield leaf
