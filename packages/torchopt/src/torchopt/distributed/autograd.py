# SPDX-License-Identifier: Apache-2.0
"""Gradients through remote calls: first-order, across processes.

Take derivatives of higher order inside the remote function. In a world of one process, and with the
collective backend, the functions here call ordinary autograd, so the same program runs everywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from torchopt.distributed.remote import agent_is_set
from torchopt.typing import TensorOrTensors, TupleOfOptionalTensors

__all__ = ["DistAutogradContext", "backward", "context", "get_gradients", "grad", "is_available"]  # noqa: F822

LOCK = threading.Lock()

_local_ids = itertools.count(-1, -1)  # torch's own identifiers are not negative


def is_available() -> bool:
    """Return whether torch has distributed autograd."""
    with contextlib.suppress(ImportError):
        return bool(_torch().is_available())
    return False


def _torch() -> Any:
    """Return torch's distributed autograd, which is imported on first use."""
    return importlib.import_module("torch.distributed.autograd")


def __getattr__(name: str) -> Any:
    if name == "DistAutogradContext":  # None where torch is built without RPC
        return getattr(_torch(), name, None) if is_available() else None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class context:  # noqa: N801 - the published name
    """The context in which a distributed forward and backward pass take place.

    With remote calls a thread can be in one context at a time; entering a second one raises
    `RuntimeError`.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> with context() as context_id:
        ...     backward(context_id, (3 * x).sum())
        >>> x.grad
        tensor([3., 3.])
    """

    def __enter__(self) -> int:
        if not agent_is_set():
            self._torch = None
            self._id = next(_local_ids)
            return self._id
        self._torch = _torch().context()
        try:
            self._id = self._torch.__enter__()
        except RuntimeError as error:
            raise RuntimeError(
                "torchopt.distributed.autograd.context: expected a thread that is in no context, "
                "found one that is in a context already; leave it before entering another, or call "
                "backward and grad several times in it, each for a loss of its own"
            ) from error
        return self._id

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._torch is not None:
            self._torch.__exit__(exc_type, exc_value, traceback)


def get_gradients(context_id: int) -> dict[Tensor, Tensor]:
    """Return the gradients of a context: a dictionary from leaf tensors of this process."""
    if context_id < 0:
        raise RuntimeError(
            "get_gradients: expected a context of remote calls, got one of a program without RPC, "
            "where gradients go to `.grad` at once"
        )
    gradients: dict[Tensor, Tensor] = _torch().get_gradients(context_id)
    return gradients


def _as_tuple(tensors: TensorOrTensors) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def backward(
    autograd_ctx_id: int,
    tensors: TensorOrTensors,
    retain_graph: bool = False,
    inputs: TensorOrTensors | None = None,
) -> None:
    """Add the gradient of the sum of `tensors` to the `.grad` of the leaves it depends on.

    Args:
        autograd_ctx_id: The value of `with context() as autograd_ctx_id`.
        tensors: 0-dim tensors.
        retain_graph: Keep the graph for another pass.
        inputs: The leaves whose `.grad` is written; None: all leaves of this process.

    Raises:
        RuntimeError: `inputs` is empty, or a tensor has no graph.
    """
    roots = _as_tuple(tensors)
    wanted = None if inputs is None else _as_tuple(inputs)
    if wanted is not None and not wanted:
        raise RuntimeError("'inputs' argument to backward() cannot be empty.")
    if autograd_ctx_id < 0:
        torch.autograd.backward(roots, retain_graph=retain_graph, inputs=wanted)
        return
    gradients = _distributed(autograd_ctx_id, roots, retain_graph)
    if wanted is not None:
        own = [(p, _look_up(gradients, p)) for p in wanted]
        pairs = [(p, g) for p, g in own if g is not None]
    else:
        pairs = list(gradients.items())
    with LOCK, torch.no_grad():
        for p, g in pairs:
            if p.grad is None:
                p.grad = g.clone()
            else:
                p.grad = p.grad + g


def grad(
    autograd_ctx_id: int,
    outputs: TensorOrTensors,
    inputs: TensorOrTensors,
    retain_graph: bool = False,
    allow_unused: bool = False,
) -> TupleOfOptionalTensors:
    """Return the gradients of the sum of `outputs` for `inputs`, without writing to `.grad`.

    Args:
        autograd_ctx_id: The value of `with context() as autograd_ctx_id`.
        outputs: 0-dim tensors.
        inputs: Leaves of this process.
        retain_graph: Keep the graph for another pass.
        allow_unused: Return None for an input that no output depends on, instead of raising.

    Raises:
        RuntimeError: An input is unused, or a tensor has no graph.
    """
    roots, wanted = _as_tuple(outputs), _as_tuple(inputs)
    if autograd_ctx_id < 0:
        return tuple(
            torch.autograd.grad(roots, wanted, retain_graph=retain_graph, allow_unused=allow_unused)
        )
    for p in wanted:
        if not p.requires_grad:
            raise RuntimeError("One of the differentiated Tensors does not require grad")
    gradients = _distributed(autograd_ctx_id, roots, retain_graph)
    found = tuple(_look_up(gradients, p) for p in wanted)
    if not allow_unused and any(g is None for g in found):
        raise RuntimeError(
            "One of the differentiated Tensors appears to not have been used in the graph. Set "
            "allow_unused=True if this is the desired behavior."
        )
    return tuple(None if g is None else g.clone() for g in found)


def _distributed(
    context_id: int, roots: Sequence[Tensor], retain_graph: bool
) -> dict[Tensor, Tensor]:
    # A context accumulates over its passes, so the gradient of this pass is the difference.
    with LOCK:
        before = {p: g.clone() for p, g in _torch().get_gradients(context_id).items()}
        _torch().backward(context_id, list(roots), retain_graph)
        after: dict[Any, Tensor] = _torch().get_gradients(context_id)
    return {p: g - before[p] if p in before else g for p, g in after.items()}


def _look_up(gradients: dict[Tensor, Tensor], p: Tensor) -> Tensor | None:
    return next((g for q, g in gradients.items() if q is p), None)
