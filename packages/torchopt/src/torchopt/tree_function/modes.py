# SPDX-License-Identifier: Apache-2.0
"""Linear maps and modes of differentiation."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import (
    in_forward_mode,
    is_batched_by_old_vmap,
    is_traced,
    is_transforming,
    pull_back,
    taken_off_old_vmap,
    with_forward_mode,
)
from torchopt.tree import is_smooth, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "derivatives_wanted",
    "forward_modes",
    "linearize",
    "linearize_parts",
    "over_batched",
    "uncompiled",
    "values",
]

Tensors = tuple[Tensor, ...]
Function = TypeVar("Function", bound="Callable[..., Any]")


# torch switches forward mode off for all levels while it runs the jvp of a Function, so that a jvp
# inside a jvp would silently be zero. It is switched on again for the outer levels, after the
# tangents of the current level have been removed.


def forward_modes() -> Any:
    """Return a context in which forward mode is on, for use inside a Function."""
    return with_forward_mode(True)


def values(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the tensors without the tangents of the current forward mode; None stays None.

    Tensors batched by the vmap of torch.autograd are returned as they are, because torch cannot
    unpack them. That is right, because a forward mode around that vmap has no other one inside.
    """
    return tuple(
        x if x is None or is_batched_by_old_vmap(x) else forward_ad.unpack_dual(x, level=0).primal
        for x in tensors
    )


def linearize(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return the value and the function from a cotangent to those of the primals, as torch's vjp.

    Zeros for primals that the value does not depend on are made from the primals themselves.
    `torch.func.vjp` makes them from its own wrappers, which fails inside other transforms.
    """
    parts = linearize_parts(function, *primals)
    if parts is not None:
        return parts

    def with_primals(*inner: Any) -> Any:
        return function(*inner), inner

    (value, _), pull, *_ = torch.func.vjp(with_primals, *primals)
    zeros = tree_map(torch.zeros_like, primals)
    return value, lambda cotangent: pull((cotangent, zeros))


def linearize_parts(function: Callable[..., Any], *primals: Any) -> tuple[Any, Any] | None:
    """Return what `linearize` returns, or None if something follows the primals.

    The returned function takes a second argument, the slice of the primals whose cotangents are
    computed; the default is all of them.
    """
    return _linearize_by_graph(function, primals) if _is_followed_by_nobody(primals) else None


def _is_followed_by_nobody(primals: tuple[Any, ...]) -> bool:
    """Return whether autograd alone can linearise, without torch.func, whose wrappers are slow."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    if is_transforming() or in_forward_mode() or is_traced():
        return False
    return all(type(x) in PLAIN_TYPES and is_smooth(x) and not x.is_inference() for x in primals)


PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _linearize_by_graph(
    function: Callable[..., Any], primals: Tensors
) -> tuple[Any, Callable[..., Any]]:
    with torch.enable_grad():
        inner = tuple(x.detach().requires_grad_() for x in primals)
        value = function(*inner)
    outputs = value if isinstance(value, tuple) else (value,)
    if not all(isinstance(y, Tensor) and is_smooth(y) for y in outputs):
        raise RuntimeError(
            "expected floating-point or complex tensors from a function that is differentiated, "
            f"got {', '.join(str(getattr(y, 'dtype', type(y).__name__)) for y in outputs)}"
        )

    tracked = [y for y in outputs if y.requires_grad]

    def pull(cotangent: Any, part: slice = slice(None)) -> Tensors:
        given = cotangent if isinstance(value, tuple) else (cotangent,)
        found: Any = [None] * len(inner[part])
        if tracked:
            found = pull_back(
                tracked,
                inner[part],
                [c for y, c in zip(outputs, given) if y.requires_grad],
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
            )
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(primals[part], found))

    return tree_map(torch.detach, value), pull


def over_batched(function: Callable[..., Tensors], tensors: Tensors) -> Tensors:
    """Return `function(*tensors)` for tensors that may be batched by the vmap of torch.autograd.

    `torch.autograd.grad(..., is_grads_batched=True)` uses an older vmap with fewer rules than that
    of torch.func. It is replaced by `torch.func.vmap`.
    """
    taken = taken_off_old_vmap(tensors)
    if taken is None:
        return function(*tensors)
    plain, dims, put_back = taken
    if plain is None:
        raise NotDifferentiableError(
            "is_grads_batched=True: expected a backward pass in the thread that asked for it. Use "
            "torch.func.vmap(torch.func.vjp(...)[1]), or a loop."
        )
    batched = torch.func.vmap(function, dims, randomness="same")
    return tuple(put_back(x) for x in batched(*plain))


def derivatives_wanted() -> bool:
    """Return whether the current computation may be differentiated."""
    return torch.is_grad_enabled() or in_forward_mode() or is_transforming()


def uncompiled(function: Function) -> Function:
    """Return a function that `torch.compile` leaves out of its graphs.

    Loops whose end depends on tensors, searches of closures, and functions with a jvp rule cannot
    be traced. (`torch.compiler.disable` as a decorator would import the whole compiler.)
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return cast("Function", called)
