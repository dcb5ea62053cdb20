# SPDX-License-Identifier: Apache-2.0
"""Blocks of a model whose activations are computed again in the backward pass.

`torch.utils.checkpoint` frees nothing in forward over reverse mode: it drops saved tensors, but the
tangents are saved beside them. Here a block is one operation of the graph.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.diff.closure import captured
from torchopt.diff.explicit.block import call_block
from torchopt.diff.explicit.block_code import ROOM
from torchopt.diff.explicit.compiled_block import ReachedByBlock, call_compiled
from torchopt.params.swap import Swap
from torchopt.torch_internals import top_saved_tensor_hooks
from torchopt.tree import tree_flatten, tree_unflatten
from torchopt.tree_function import call_across_vmap, is_transforming

__all__ = ["find_blocks", "rematerialised"]

_active = threading.local()
_lock = threading.Lock()
_patched: dict[int, tuple[int, Any]] = {}  # how often a block is patched, and its own forward


def find_blocks(loss: Any, names: Sequence[str] | None) -> list[nn.Module]:
    """Return the blocks of the modules that a loss reaches.

    Args:
        loss: The loss.
        names: Dotted names of blocks in these modules. None finds them: the members of each
            `nn.ModuleList` or `nn.Sequential` with at least two, all of one class and with
            parameters of the same names and shapes.

    Raises:
        ValueError: A name does not belong to any module.
    """
    modules = [x for _, x in captured(loss, nn.Module)]
    if names is None:
        found = [block for module in modules for block in _equal_blocks(module)]
    else:
        found = []
        for name in names:
            owners = [m for m in modules if name in dict(m.named_modules())]
            if not owners:
                raise ValueError(
                    f"inner_loop: blocks: expected names of sub-modules of what the loss calls, "
                    f"got {name!r}; see dict(module.named_modules())."
                )
            found.append(owners[0].get_submodule(name))
    unique = {id(block): block for block in found}
    inside = {id(x) for block in unique.values() for x in list(block.modules())[1:]}
    return [block for block in unique.values() if id(block) not in inside]


def _equal_blocks(module: nn.Module) -> list[nn.Module]:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
        return []
    forms = {
        (type(block), tuple((k, p.shape) for k, p in block.named_parameters())) for block in module
    }
    simple = isinstance(module[0], nn.ModuleDict) or not list(module[0].parameters())
    return [] if len(forms) > 1 or simple else list(module)


@contextlib.contextmanager
def rematerialised(
    blocks: Sequence[nn.Module], compiled: bool = False, known: dict[int, Any] | None = None
) -> Iterator[None]:
    """Return a context in which these blocks, called in this thread, keep only their inputs.

    Args:
        blocks: The blocks.
        compiled: Whether they run as compiled programs.
        known: A cache of what is known about them, by their ids.
    """
    if not blocks:
        yield
        return
    with _lock:
        for block in blocks:
            count, present = _patched.get(id(block), (0, block.__dict__.get("forward")))
            if not count:
                block.__dict__["forward"] = _wrapped(block, {} if known is None else known)
            _patched[id(block)] = count + 1, present
    before = getattr(_active, "on", False), getattr(_active, "room", None)
    _active.on, _active.room = True, ROOM // len(blocks) if compiled else None
    try:
        yield
    finally:
        _active.on, _active.room = before
        with _lock:
            for block in blocks:
                count, present = _patched.pop(id(block))
                if count > 1:
                    _patched[id(block)] = count - 1, present
                elif present is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = present


def _wrapped(block: nn.Module, known: dict[int, _Wrapped]) -> _Wrapped:
    found, forward = known.get(id(block)), block.forward
    if found is None or not found.is_of(block, forward):
        known[id(block)] = found = _Wrapped(block, forward)
    return found


class _Wrapped:
    """The forward of a block as one operation."""

    not_searched = True

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        self._block, self._forward = block, forward
        self._reached = ReachedByBlock(block, forward)

    def is_of(self, block: nn.Module, forward: Callable[..., Any]) -> bool:
        """Return whether this is the forward of a block."""
        same = isinstance(forward, types.MethodType) and forward == self._forward
        return self._block is block and (same or forward is self._forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_active, "on", False) or not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if top_saved_tensor_hooks(True) is not None:  # such as a checkpoint around the block
            return self._forward(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs), none_is_leaf=True)
        if _active.room is not None:
            reached, room = self._reached, _active.room
            return call_compiled(self._block, self._forward, leaves, spec, reached, room)
        where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        named = dict(self._block.named_parameters())
        tensors: list[Any] = [*(leaves[i] for i in where), *named.values()]

        def function(*inner: Tensor) -> Any:
            filled = list(leaves)
            for i, x in zip(where, inner):
                filled[i] = x
            rebuilt: Any = tree_unflatten(spec, filled)
            given, keywords = rebuilt
            with Swap(self._block, dict(zip(named, inner[len(where) :])), tie_weights=True):
                return self._forward(*given, **keywords)

        if is_transforming():
            return call_across_vmap(self._called, function, tensors, len(where))
        return self._called(function, tensors, len(where))

    def _called(self, function: Callable[..., Any], tensors: Sequence[Tensor], inputs: int) -> Any:
        return call_block(self._forward, function, tensors, inputs)
