# SPDX-License-Identifier: Apache-2.0
"""The private state of torch's activation checkpoints."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint

from torchopt.torch_internals.transforms import forward_mode_enabled

__all__ = [
    "checkpoint_of",
    "is_checkpoint_in_transform",
    "pack_hooks",
    "recompute_in",
    "reentrant_checkpoint",
    "saved_tensor_hooks_allowed",
    "top_saved_tensor_hooks",
    "without_saved_tensor_hooks",
]

_autograd: Any = torch._C._autograd

#: Called with True: return this thread's innermost (pack, unpack) hooks for saved tensors, or None.
top_saved_tensor_hooks: Callable[[bool], tuple[Callable[..., Any], Callable[..., Any]] | None] = (
    _autograd._top_saved_tensors_default_hooks
)


# The qualified name of the pack hook, and its variable that holds the checkpoint (or a weak
# reference to it).
_OF_FORWARD = ("_checkpoint_hook.__init__.<locals>.pack_hook", "frame")
_OF_RECOMPUTATION = ("_recomputation_hook.__init__.<locals>.pack_hook", "target_frame_ref")
_RECOMPUTED = "_torchopt_recomputed_in_context"


@contextlib.contextmanager
def without_saved_tensor_hooks() -> Iterator[list[tuple[Callable[..., Any], Callable[..., Any]]]]:
    """Return a context in which this thread has no hooks for saved tensors.

    torch.func refuses to differentiate under such hooks. They only matter for graphs that outlive
    the context, so a function that is linearised and released inside does not need them.

    Yields:
        The pairs (pack, unpack) that were removed, outermost first.
    """
    pairs: list[Any] = []
    try:
        while (pair := top_saved_tensor_hooks(True)) is not None:
            _autograd._pop_saved_tensors_default_hooks()
            pairs.insert(0, pair)
        yield pairs
    finally:
        for pair in pairs:
            _autograd._push_saved_tensors_default_hooks(*pair)


@contextlib.contextmanager
def saved_tensor_hooks_allowed() -> Iterator[None]:
    """Return a context in which hooks for saved tensors may be set, which torch.func forbids."""
    message = _autograd._saved_tensors_hooks_get_disabled_error_message()
    if message is None:
        yield
        return
    _autograd._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        _autograd._saved_tensors_hooks_disable(message)


def pack_hooks() -> list[Callable[..., Any]]:
    """Return this thread's pack hooks for saved tensors, outermost first."""
    with without_saved_tensor_hooks() as pairs:  # torch shows only the innermost pair
        return [pack for pack, _ in pairs]


def checkpoint_of(pack: Callable[..., Any]) -> tuple[Any, bool] | None:
    """Return the checkpoint of a pack hook, and whether it is being recomputed.

    None for a hook that does not belong to a checkpoint. The checkpoint is the object that torch
    keeps for a call of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` as long as it
    may be recomputed.
    """
    if getattr(pack, "__module__", None) != torch_checkpoint.__name__:
        return None
    for (name, variable), recomputed in ((_OF_FORWARD, False), (_OF_RECOMPUTATION, True)):
        if getattr(pack, "__qualname__", None) == name:
            function = inspect.unwrap(pack)
            cells: Any = function.__closure__
            found = cells[function.__code__.co_freevars.index(variable)].cell_contents
            return (found() if recomputed else found), recomputed
    return None


def recompute_in(context: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Change the function that recomputes the checkpoints in which the caller runs.

    Args:
        context: Takes the function that recomputes, and returns its replacement. It is called once
            for each checkpoint.
    """
    if top_saved_tensor_hooks(True) is None:
        return
    for checkpoint, recomputed in filter(None, map(checkpoint_of, pack_hooks())):
        if not recomputed and not hasattr(checkpoint, _RECOMPUTED):
            setattr(checkpoint, _RECOMPUTED, True)
            checkpoint.recompute_fn = context(checkpoint.recompute_fn)


def reentrant_checkpoint() -> Any:
    """Return the ctx of the caller's outermost checkpoint with `use_reentrant=True`.

    None if the caller does not run inside such a checkpoint.
    """
    # Only the forward pass of a torch.autograd.Function switches off both grad and forward mode.
    if torch.is_grad_enabled() or forward_mode_enabled():
        return None
    if torch.is_inference_mode_enabled():
        return None
    code = torch_checkpoint.CheckpointFunction.forward.__code__
    found = None
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            found = frame.f_locals["ctx"]
        frame = frame.f_back
    return found


def is_checkpoint_in_transform(error: RuntimeError) -> bool:
    """Return whether a checkpoint raised `error` because it ran inside a torch.func transform."""
    if not any(part in str(error) for part in ("saved tensor hooks", "setup_context")):
        return False
    code = inspect.unwrap(torch_checkpoint.checkpoint).__code__
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is code:
            return True
        trace = trace.tb_next
    return False
