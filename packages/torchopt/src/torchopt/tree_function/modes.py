# SPDX-License-Identifier: Apache-2.0
"""Linear maps and modes of differentiation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import (
    in_forward_mode,
    is_transforming,
    taken_off_old_vmap,
    with_forward_mode,
)
from torchopt.tree import tree_map

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["derivatives_wanted", "forward_modes", "linearize", "over_batched", "values"]

Tensors = tuple[Tensor, ...]


# torch runs the jvp of a Function with forward mode switched off, for all levels, so that a jvp
# inside a jvp would silently be zero. It is switched on again for the outer ones; the tangents of
# the present one are taken off first.


def forward_modes() -> Any:
    """Return a context with forward mode on, inside of a Function, which switches it off."""
    return with_forward_mode(True)


def values(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the tensors without the tangents of the present forward mode; None stays."""
    return tuple(None if x is None else forward_ad.unpack_dual(x, level=0).primal for x in tensors)


def linearize(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return what `torch.func.vjp` returns: the value, and cotangent -> cotangents of the primals.

    The zeros for primals that the value does not depend on are made from the primals themselves;
    torch makes them from wrappers of its own, which fails inside of other transforms.
    """

    def with_primals(*inner: Any) -> Any:
        return function(*inner), inner

    (value, _), pull, *_ = torch.func.vjp(with_primals, *primals)
    zeros = tree_map(torch.zeros_like, primals)
    return value, lambda cotangent: pull((cotangent, zeros))


def over_batched(function: Callable[..., Tensors], tensors: Tensors) -> Tensors:
    """Return `function(*tensors)`, where the tensors may belong to the vmap of torch.autograd.

    `torch.autograd.grad(..., is_grads_batched=True)` has a vmap of its own, older than torch.func's
    and with fewer rules: it is taken off, and torch.func's put in its place.
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
    """Return whether anybody may differentiate what is computed now."""
    return torch.is_grad_enabled() or in_forward_mode() or is_transforming()
