# SPDX-License-Identifier: Apache-2.0
"""Backward passes, version counters of tensors, and process-wide switches."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AccumulateGrad",
    "any_autocast",
    "autocast_now",
    "backward_into",
    "backward_pass",
    "bump_versions",
    "counts_for_any_autocast",
    "dtypes_of_node",
    "graph_is_kept",
    "holds_alone",
    "hooks_of_gradient",
    "hooks_of_node",
    "is_zero_tensor",
    "no_view",
    "overlaps_itself",
    "pull_back",
    "with_and_without_negation",
    "without_function_modes",
    "without_recurrent_kernels",
]

#: Return whether autocast is enabled for any of the device types that torch checks in one call.
any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled


#: The class of the nodes at which a graph ends, in a leaf: `variable`. Other nodes may have an
#: attribute of this name, which a custom function gave its context.
AccumulateGrad: Any = getattr(torch._C._functions, "AccumulateGrad")  # noqa: B009 - it has no stub

#: Return whether the current backward pass keeps its graph; True outside a backward pass.
graph_is_kept: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

_engine: Any = torch.autograd.Variable._execution_engine


def backward_into(loss: torch.Tensor, start: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    """Call `torch.autograd.backward((loss,), (start,), inputs=inputs)`, faster.

    It skips torch's checks in Python, which take a fifth of the time on a small network. The caller
    must ensure that `start` has the shape and dtype of `loss`, that `loss` requires a gradient, and
    that `inputs` is not empty.
    """
    if loss.dtype.is_floating_point and _are_plain((loss, *inputs)):
        _run_backward((loss,), (start,), False, False, inputs, accumulate=True)
    else:
        torch.autograd.backward((loss,), (start,), inputs=tuple(inputs))


def backward_pass(
    loss: torch.Tensor, inputs: Sequence[torch.Tensor], *, retain_graph: bool, create_graph: bool
) -> Sequence[Any]:
    """Return `torch.autograd.grad(loss, inputs, allow_unused=True, ...)`, faster.

    It skips torch's checks in Python, which take a fifth of the time on a small network. The caller
    must ensure that `loss` has one element and requires a gradient.
    """
    if type(loss) is torch.Tensor and loss.dtype.is_floating_point and _are_plain(inputs):
        one = torch.ones_like(loss, memory_format=torch.preserve_format)
        return _run_backward((loss,), (one,), retain_graph, create_graph, inputs)
    return torch.autograd.grad(
        loss, inputs, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )


def pull_back(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> Sequence[Any]:
    """Return `torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, ...)`, faster.

    It skips torch's checks in Python. The caller must ensure that the outputs require a gradient
    and that the cotangents have their shapes and dtypes.
    """
    if _are_plain(inputs) and _are_plain(outputs):
        return _run_backward(outputs, cotangents, retain_graph, create_graph, inputs)
    return torch.autograd.grad(
        outputs, inputs, cotangents, retain_graph, create_graph, allow_unused=True
    )


def _are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether torch's checks can be skipped for these tensors."""
    return (
        _NO_OTHERS.issuperset(map(type, tensors))
        and not torch._C._is_torch_function_mode_enabled()
        and not torch.compiler.is_compiling()
    )


def _run_backward(
    outputs: Sequence[torch.Tensor],
    cotangents: Sequence[torch.Tensor],
    retain_graph: bool,
    create_graph: bool,
    inputs: Sequence[torch.Tensor],
    *,
    accumulate: bool = False,
) -> Sequence[Any]:
    found: Sequence[Any] = _engine.run_backward(
        tuple(outputs),
        tuple(cotangents),
        retain_graph,
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=accumulate,
    )
    return found


#: A context in which no `TorchFunctionMode` sees operations.
without_function_modes: Callable[[], Any] = torch._C.DisableTorchFunction

_NO_OTHERS = frozenset((torch.Tensor, torch.nn.Parameter))


def autocast_now() -> dict[str, dict[str, Any]]:
    """Return the autocast settings of each device type; empty if autocast is off."""
    if not any_autocast():
        return {}
    return {
        device: {
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for device in ("cpu", "cuda")
    }


def counts_for_any_autocast(device: str) -> bool:
    """Return whether `any_autocast` covers this device type."""
    if any_autocast():
        return False
    torch.set_autocast_enabled(device, True)
    try:
        return any_autocast()
    finally:
        torch.set_autocast_enabled(device, False)


#: Return whether a tensor is a zero without memory, such as the tangent of a constant.
is_zero_tensor: Callable[[Tensor], bool] = Tensor._is_zerotensor


def _accepts_lists() -> bool:
    x = torch.zeros(())
    try:
        torch.autograd.graph.increment_version([x])  # since torch 2.6
    except (TypeError, RuntimeError, AttributeError):
        return False
    return x._version == 1


def _bump_one_by_one(tensors: list[Tensor]) -> None:
    for x in tensors:
        torch.autograd.graph.increment_version(x)


#: Increment the version counters of tensors that were written to.
bump_versions: Callable[[list[Tensor]], None] = (
    torch._C._increment_version if _accepts_lists() else _bump_one_by_one
)


@contextlib.contextmanager
def without_recurrent_kernels() -> Iterator[None]:
    """Return a context in which recurrent layers do not use mkldnn and cuDNN.

    The kernels of these libraries have no forward mode and no second derivative. The contexts in
    `torch.backends` change more settings, and warn if a device is missing.
    """
    internals: Any = torch._C
    # The switches are process-wide: the last thread to leave restores them.
    with _switches:
        if not _switched:
            _found[:] = internals._get_mkldnn_enabled(), internals._get_cudnn_enabled()
        _switched.append(None)
        internals._set_mkldnn_enabled(False)
        internals._set_cudnn_enabled(False)
    try:
        yield
    finally:
        with _switches:
            _switched.pop()
            if not _switched:
                internals._set_mkldnn_enabled(_found[0])
                internals._set_cudnn_enabled(_found[1])


_switches = threading.Lock()
_switched: list[None] = []  # one entry for each active context
_found: list[bool] = []


def dtypes_of_node(node: Any) -> list[torch.dtype]:
    """Return the dtypes of the results of a graph node."""
    return [x.dtype for x in getattr(node, "_input_metadata", ())]


def hooks_of_node(node: Any) -> list[dict[Any, Callable[..., Any]]]:
    """Return the hooks of a graph node: those that run before it and those that run after it.

    torch shows them only in the handle of a newly registered hook.
    """
    found = []
    for register in (node.register_prehook, node.register_hook):
        handle = register(_nothing)
        hooks = handle.hooks_dict_ref()
        handle.remove()
        found.append(hooks)
    return [hooks for hooks in found if hooks]


def no_view(x: Tensor) -> Tensor:
    """Return x as a tensor that is not a view.

    A view that a Function returns must not be written to; this tensor may be. It shares its memory
    with x, which must no longer be used.
    """
    found: Tensor = torch.ops.aten._unsafe_view(x, x.shape)
    return found


def _nothing(*_: Any) -> None:
    return None


def overlaps_itself(x: Tensor) -> bool:
    """Return whether two elements of a strided tensor are known to share memory."""
    found: bool = torch._debug_has_internal_overlap(x) == 1
    return found


def holds_alone(grad: Tensor, *, in_hook: bool = False) -> bool:
    """Return whether no other tensor or array sees the memory of a gradient.

    autograd may give two parameters gradients that share memory, and a custom backward may return a
    view of a tensor that somebody keeps, or memory that torch has not allocated, such as an array.

    Args:
        grad: The `.grad` of a leaf.
        in_hook: Whether this is the only hook that runs after the first gradient of the leaf came,
            when autograd itself may still hold it.
    """
    allocated: bool = grad.untyped_storage().resizable()
    return allocated and _holders(grad) <= _holders_of_new_gradients()[in_hook]


def hooks_of_gradient(p: Tensor) -> int:
    """Return the number of hooks that run after a gradient of a leaf was added to its `.grad`."""
    return len(p._post_accumulate_grad_hooks or ())


def _holders(x: Tensor) -> int:
    count: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata)
    return count


@functools.cache
def _holders_of_new_gradients() -> tuple[int, int]:
    """Return the holders of the memory of a gradient that nobody shares: afterwards, in a hook."""
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        p = torch.zeros(2, requires_grad=True)
        p.register_post_accumulate_grad_hook(lambda p: found.append(_holders(_grad(p))))
        (p * 2.0).sum().backward()
    return _holders(_grad(p)), found[0]


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def with_and_without_negation() -> tuple[list[Tensor], list[Tensor]]:
    """Return tensors on the CPU without and with a pending negation; they differ in nothing else.

    Among both are views, views of views, detached tensors and parameters of four dtypes.
    """
    kinds: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: x,
        lambda x: x.view(-1)[:1],
        Tensor.detach,
        torch.nn.Parameter,
    )
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for k, dtype in enumerate((torch.float32, torch.float64, torch.float16, torch.bfloat16)):
        for i, kind in enumerate(kinds):
            # In alternating order, so that addresses do not tell them apart.
            for negated in (0, 1) if (i + k) % 2 else (1, 0):
                x = torch.zeros(i + 1, dtype=dtype, device="cpu")
                found[negated].append(kind(torch._neg_view(x) if negated else x))
    return found
