# SPDX-License-Identifier: Apache-2.0
"""The state of torch.func transforms, vmaps and forward mode, and of tensors inside them.

A tensor is called watched if a graph, a transform or forward mode may record what happens to it.
A level is one of the nested transforms of torch.func; level 0 is outside all of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import (
    retrieve_current_functorch_interpreter,
    temporarily_pop_interpreter_stack,
)
from torch.autograd import forward_ad

__all__ = [
    "any_watched",
    "below_transforms",
    "count_forward_modes",
    "count_transforms",
    "entries_of_batch",
    "forward_mode",
    "forward_mode_enabled",
    "gradient_in_transform",
    "has_tangent",
    "in_dispatch_mode",
    "in_forward_mode",
    "in_forward_mode_of_this_thread",
    "in_make_fx",
    "in_vmap",
    "in_vmap_of_nothing",
    "inner_transforms_are_vmaps",
    "is_batched",
    "is_batched_backward",
    "is_batched_by_old_vmap",
    "is_differentiated",
    "is_traced",
    "is_tracked",
    "is_transforming",
    "is_watched",
    "is_wrapped",
    "outside_transforms",
    "plain_entry",
    "set_forward_mode",
    "taken_off_old_vmap",
    "vmap_again",
    "vmap_lists",
    "with_forward_mode",
]

#: Return whether a tensor belongs to a transform of torch.func.
is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor

#: Return whether the caller runs inside a transform of torch.func.
is_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


#: Return whether a tensor is batched by the legacy vmap, which is older than torch.func.
is_batched_by_old_vmap: Callable[[Tensor], bool] = getattr(
    torch._C._functorch, "is_legacy_batchedtensor", lambda x: False
)

#: Return whether forward mode is enabled; it is not inside the derivative of a Function.
forward_mode_enabled: Callable[[], bool] = torch._C._is_fwd_grad_enabled


def in_forward_mode() -> bool:
    """Return whether tensors may have tangents."""
    return forward_ad._current_level >= 0


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Return a context in which tensors may have tangents.

    torch has one forward mode for all threads of a process, so other threads that enter this
    context wait. Inside a Function torch disables it, and every tangent would silently be zero;
    this context enables it again.
    """
    with _one_forward_mode, with_forward_mode(True), forward_ad.dual_level():
        yield


_one_forward_mode = threading.RLock()


def in_forward_mode_of_this_thread() -> bool:
    """Return `in_forward_mode()`, ignoring other threads inside `forward_mode`."""
    if not in_forward_mode():
        return False
    with _one_forward_mode:  # waits until the other thread has left
        return in_forward_mode()


def has_tangent(x: Tensor) -> bool:
    """Return whether a tensor has a tangent."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def gradient_in_transform(
    function: Callable[[Sequence[Tensor]], tuple[Tensor, Sequence[Any]]], at: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Any]]:
    """Return the gradients of a 0-dim tensor inside a transform, and further outputs.

    Like `torch.func.grad`, but with None instead of zeros for tensors that the value does not
    depend on at all.

    Args:
        function: A function of a list of tensors that returns a 0-dim tensor and a list of further
            outputs.
        at: The tensors at which to differentiate.

    Returns:
        The gradients, and the further outputs, whose tensors belong to the caller's level.
    """
    internals: Any = eager_transforms
    with internals.grad_increment_nesting() as level, torch.enable_grad():
        wrapped = internals._wrap_all_tensors(tuple(at), level)
        inner = [internals._create_differentiable(x, level) for x in wrapped]
        value, others = function(inner)
        found = torch.autograd.grad(value, inner, create_graph=True, allow_unused=True)

        def lowered(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return internals._undo_create_differentiable(x, level)

        return [lowered(g) for g in found], [lowered(x) for x in others]


_functorch: Any = torch._C._functorch

# Parsed once, because torch takes 5 us to convert a name into a key.
_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
_BATCHED = torch._C._dispatch_key_parse("Batched")


def count_forward_modes() -> int:
    """Return the number of jvp transforms of torch.func in which the caller runs."""
    stack = _functorch.get_interpreter_stack() or []
    return sum(level.key() == _functorch.TransformType.Jvp for level in stack)


#: Return a context in which forward mode is enabled (True) or disabled (False).
with_forward_mode: Callable[[bool], Any] = forward_ad._set_fwd_grad_enabled

#: Enable or disable forward mode for this thread.
set_forward_mode: Callable[[bool], None] = torch._C._set_fwd_grad_enabled


def any_watched(tensors: Iterable[Tensor]) -> bool:
    """Return whether one of the tensors is watched by a graph, a transform or forward mode."""
    with_graph = torch.is_grad_enabled()
    with_tangents = forward_ad._current_level >= 0
    if not with_graph and not with_tangents:
        return any(map(is_wrapped, tensors))
    for x in tensors:
        if (
            (with_graph and x.requires_grad)
            or is_wrapped(x)
            or (with_tangents and forward_ad.unpack_dual(x).tangent is not None)
        ):
            return True
    return False


def is_batched_backward(cotangents: Iterable[Tensor]) -> bool:
    """Return whether cotangents are a batch from `torch.autograd.grad(is_grads_batched=True)`.

    These belong to the legacy vmap, which does not call the vmap rule of a Function.
    """
    if not torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE):
        return False
    return any(torch._C._dispatch_keys(x).has(_BATCHED) for x in cotangents)


def taken_off_old_vmap(
    tensors: Sequence[Tensor],
) -> tuple[list[Tensor] | None, tuple[int | None, ...], Callable[[Tensor], Tensor]] | None:
    """Return tensors without the batch of the legacy vmap, or None outside it.

    Returns:
        (tensors, batch dimension of each or None, function that makes a tensor a batch again). The
        tensors are None in a thread other than that of the vmap.
    """
    old = [torch._C._dispatch_keys(x).has(_BATCHED) for x in tensors]
    if not any(old):
        return None
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = tuple(0 if o else None for o in old)

    def put_back(x: Tensor) -> Tensor:
        return torch._add_batch_dim(x, 0, level)

    if level < 1:
        return None, dims, put_back
    plain = [torch._remove_batch_dim(x, level, 0, 0) if o else x for x, o in zip(tensors, old)]
    return plain, dims, put_back


def is_watched(x: Tensor) -> bool:
    """Return whether a graph, a transform or forward mode watches `x`."""
    return any_watched((x,))


_is_compiling = torch.compiler.is_compiling
_dispatch_mode: Any = torch._C._get_dispatch_mode
_PROXY: Any = torch._C._TorchDispatchModeKey.PROXY
_tracing_state: Any = torch._C._get_tracing_state


def is_traced() -> bool:
    """Return whether operations are traced to run later, which would miss a kernel call."""
    return _is_compiling() or in_make_fx() or _tracing_state() is not None


def in_make_fx() -> bool:
    """Return whether operations are traced by `make_fx`."""
    return _dispatch_mode(_PROXY) is not None


def in_dispatch_mode() -> bool:
    """Return whether a mode sees all operations; it may answer them otherwise, as with fakes."""
    count: int = torch._C._len_torch_dispatch_stack()
    return count > 0


def is_tracked(x: Tensor) -> bool:
    """Return whether x may be differentiated at some level, or belongs to a vmap."""
    return is_batched(x) or is_differentiated(x)


def is_differentiated(x: Tensor, lowest: int = 0) -> bool:
    """Return whether a graph, a transform or forward mode may differentiate x at some level.

    Args:
        x: A tensor.
        lowest: The lowest level to check; 0 is outside all transforms.
    """
    if not is_wrapped(x):
        return lowest == 0 and _has_derivative(x)
    with contextlib.ExitStack() as above:
        # Only the innermost level sees its own state, so the levels above are removed meanwhile.
        for level in range(count_transforms(), lowest - 1, -1):
            if _functorch.maybe_get_level(x) == level:
                if not _functorch.is_batchedtensor(x) and _has_derivative(x):
                    return True
                x = _functorch.get_unwrapped(x)
            if level:
                above.enter_context(temporarily_pop_interpreter_stack())
        return lowest == 0 and _has_derivative(below_transforms(x))


def count_transforms() -> int:
    """Return the number of active transforms of torch.func."""
    return len(_functorch.get_interpreter_stack() or ())


@contextlib.contextmanager
def outside_transforms() -> Iterator[None]:
    """Return a context in which no transform of torch.func sees operations."""
    with contextlib.ExitStack() as above:
        for _ in range(count_transforms()):
            above.enter_context(temporarily_pop_interpreter_stack())
        yield


def inner_transforms_are_vmaps(count: int) -> bool:
    """Return whether all transforms are vmaps, apart from the outermost `count`."""
    stack = _functorch.get_interpreter_stack() or []
    return all(level.key() == _functorch.TransformType.Vmap for level in stack[count:])


def _vmaps() -> list[Any]:
    stack = _functorch.get_interpreter_stack() or []
    return [level for level in stack if level.key() == _functorch.TransformType.Vmap]


def in_vmap() -> bool:
    """Return whether one of the transforms around the caller is a vmap."""
    return bool(_vmaps())


def in_vmap_of_nothing() -> bool:
    """Return whether a vmap around the caller has a batch without entries."""
    return any(_functorch.CVmapInterpreterPtr(level).batchSize() == 0 for level in _vmaps())


def _has_derivative(x: Tensor) -> bool:
    if x.requires_grad or not in_forward_mode():
        return x.requires_grad
    return forward_ad.unpack_dual(x, level=0).tangent is not None


def below_transforms(x: Tensor) -> Tensor:
    """Return the tensor inside all wrappers of torch.func; its batches are plain dimensions."""
    while is_wrapped(x):
        x = _functorch.get_unwrapped(x)
    return x


def plain_entry(x: Tensor) -> Tensor:
    """Return the detached tensor inside all wrappers; of each batch, the first entry."""
    while is_wrapped(x):
        dim = _functorch.maybe_get_bdim(x) if _functorch.is_batchedtensor(x) else -1
        x = _functorch.get_unwrapped(x)
        if dim >= 0:
            x = x.select(dim, 0)
    return x.detach()


def entries_of_batch(x: Tensor, dim: int) -> list[Tensor]:
    """Return the entries of a batch; of a batch without entries, one of zeros."""
    if x.shape[dim]:
        return list(x.unbind(dim))
    return [x.new_zeros((*x.shape[:dim], *x.shape[dim + 1 :]))]


def is_batched(x: Tensor) -> bool:
    """Return whether x belongs to a vmap at some level."""
    while is_wrapped(x):
        if _functorch.is_batchedtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def vmap_lists(
    function: Callable[[list[Tensor]], Sequence[Tensor]],
    tensors: Sequence[Tensor],
    dims: Sequence[int | None],
    randomness: str = "different",
) -> list[Tensor]:
    """Return `torch.func.vmap(function, (dims,), randomness=randomness)(tensors)`.

    It takes lists of tensors only and skips torch's tree handling in Python, which takes a tenth of
    the time for 32 tasks of a small network. The caller must ensure that one of `dims` is not None
    and that the batch sizes agree.
    """
    size = next(x.shape[d] for x, d in zip(tensors, dims) if d is not None)
    _vmap.lazy_load_decompositions()
    with _vmap.vmap_increment_nesting(size, randomness) as level:
        batched = [
            x if d is None else _functorch._add_batch_dim(x, d % x.ndim, level)
            for x, d in zip(tensors, dims)
        ]
        return [_functorch._remove_batch_dim(y, level, size, 0) for y in function(batched)]


_vmap: Any = torch._functorch.vmap


def vmap_again() -> Callable[[Callable[..., Any]], Callable[..., Any]] | None:
    """Return a decorator that makes a function run later as if inside the current vmap.

    None outside a vmap, and inside several transforms.
    """
    if count_transforms() != 1:
        return None
    present: Any = retrieve_current_functorch_interpreter()
    if present.key() != _functorch.TransformType.Vmap:
        return None
    size, randomness = present.batch_size(), present.randomness()

    def again(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if is_transforming():
                return function(*args, **kwargs)
            with _vmap.vmap_increment_nesting(size, randomness):
                return function(*args, **kwargs)

        return run

    return again
