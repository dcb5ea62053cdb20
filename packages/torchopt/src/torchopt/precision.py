# SPDX-License-Identifier: Apache-2.0
"""The precision of rules: complex numbers as pairs, half types in float32, no autocast.

A transformation returns the same values eagerly, under vmap, in forward mode and compiled.
Therefore half types are widened here, for every rule, and rounded once after the rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import filterfalse
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from torchopt.torch_internals import (
    any_autocast,
    autocast_now,
    counts_for_any_autocast,
    default_device,
)

__all__ = [
    "Modes",
    "as_computed",
    "as_given",
    "dense",
    "forget_casts",
    "is_narrow",
    "is_special",
    "present_autocast",
    "stored",
    "widened",
    "with_autocast",
    "with_default_device",
    "without_autocast",
]

Function = TypeVar("Function", bound=Callable[..., Any])

_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.complex32: torch.complex64,
}
_SPECIAL = frozenset((*_WIDER, torch.complex64, torch.complex128))
_AUTOCAST_DEVICES = tuple(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla", "maia", "privateuseone")
    if torch.amp.is_autocast_available(device)
)
# The device types that `any_autocast` does not cover.
_UNCOUNTED_DEVICES = tuple(filterfalse(counts_for_any_autocast, _AUTOCAST_DEVICES))


def is_special(values: Iterable[Any]) -> bool:
    """Return whether a rule gets one of `values` in another form: complex or of a half type."""
    return any(isinstance(x, Tensor) and x.dtype in _SPECIAL for x in values)


def is_narrow(values: Iterable[Any]) -> bool:
    """Return whether `widened` changes one of `values`."""
    return any(isinstance(x, Tensor) and x.dtype in _WIDER for x in values)


def widened(x: Any) -> Any:
    """Return a tensor of a half type in float32, and any other value unchanged."""
    return x.to(_WIDER[x.dtype]) if isinstance(x, Tensor) and x.dtype in _WIDER else x


def dense(x: Any) -> Any:
    """Return a sparse tensor as a dense one, and any other value unchanged."""
    return x.to_dense() if isinstance(x, Tensor) and x.layout is not torch.strided else x


def stored(x: Tensor) -> Tensor:
    """Return the elements of a tensor that are in memory: all, or those of a sparse tensor."""
    return x.coalesce().values() if x.is_sparse else dense(x)


def as_computed(x: Any, *, pairs: bool = True, widen: bool = True) -> Any:
    """Return `x` in the form in which rules compute.

    With `pairs`, a complex number is a pair of real ones, as in torch.optim.
    """
    if not isinstance(x, Tensor):
        return x  # a state may hold Python numbers, such as a step count
    if pairs and x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return widened(x) if widen else x


def as_given(values: Sequence[Any], like: Sequence[Any]) -> list[Any]:
    """Return the results of a rule in the dtypes of `like`, its arguments.

    A value stays as it is where `like` is not a floating-point or complex tensor. A list that was
    written in place is returned.
    """
    if values is like and isinstance(values, list):
        return values
    return [
        x
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype is y.dtype
        else _as_given(x, y)
        for x, y in zip(values, like)
    ]


def _as_given(x: Any, like: Any) -> Any:
    if not isinstance(x, Tensor) or not isinstance(like, Tensor):
        return x
    if like.is_complex() and not x.is_complex():
        x = torch.view_as_complex(x.contiguous())
    if x.dtype == like.dtype or not (like.is_floating_point() or like.is_complex()):
        return x
    return x.to(like.dtype)


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Return a context in which autocast is off, whatever the caller has switched on."""
    with contextlib.ExitStack() as stack:
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def with_autocast(settings: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Return a context with the settings that `autocast_now` returned elsewhere."""
    with contextlib.ExitStack() as stack:
        if not settings:
            stack.enter_context(without_autocast())
        for device, options in settings.items():
            stack.enter_context(torch.autocast(device, **options))
        yield


def with_default_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return a context with this default device, which backward passes do not have."""
    return contextlib.nullcontext() if default_device() == device else device


class Modes(NamedTuple):
    """The modes of torch in which a function ran, for when it runs again.

    A backward pass has neither the autocast nor the default device of the forward pass.
    """

    autocast: dict[str, dict[str, Any]]
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def now() -> Modes:
        """Return the present modes."""
        return Modes(autocast_now(), default_device(), torch.get_default_dtype())

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Return a context with these modes."""
        present = torch.get_default_dtype()
        with with_default_device(self.device), with_autocast(self.autocast):
            if self.dtype is present:  # it is that of all threads, so it is left alone
                yield
                return
            torch.set_default_dtype(self.dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(present)


def autocast_devices() -> list[str]:
    """Return the types of device for which autocast is on."""
    devices = _AUTOCAST_DEVICES if any_autocast() else _UNCOUNTED_DEVICES
    return [device for device in devices if torch.is_autocast_enabled(device)]


def forget_casts() -> None:
    """Drop the copies of weights in lower precision that autocast keeps.

    Autocast casts a weight once and keeps the copy until the outermost region ends. After a write
    to the weight, or if the copy was made without a graph, a later forward pass would use it with
    the old values, or without a gradient.
    """
    if not torch.compiler.is_compiling() and autocast_devices():
        torch.clear_autocast_cache()


def present_autocast() -> Callable[[Function], Function]:
    """Return a decorator, with which functions of the caller run in the present autocast settings.

    Arithmetic between them runs `without_autocast`, so that it is as accurate as its arguments.
    """
    settings = autocast_now()

    def decorate(function: Function) -> Function:
        def called(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                for device, options in settings.items():
                    stack.enter_context(torch.autocast(device, **options))
                return function(*args, **kwargs)

        return called if settings else function  # type: ignore[return-value]  # same signature

    return decorate
