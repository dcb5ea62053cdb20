# SPDX-License-Identifier: Apache-2.0
"""Operations of torch whose second derivative is wrong without a word (2.13 and before)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable

__all__ = [
    "correct_second_derivatives",
    "has_weight_norm",
    "is_once_differentiable",
    "weight_norm",
]

_WEIGHT_NORM: Any = getattr(torch._C._functions, "WeightNormInterfaceBackward0", None)
_CONSTANT = "linear_cross_entropy"  # computed in chunks: its gradient counts as a constant
_ONCE = once_differentiable(lambda ctx: None).__code__


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return `torch._weight_norm(v, g, dim)`, g v / ‖v‖, from operations with right derivatives.

    The backward pass of torch's kernel takes ‖v‖ for a constant when it is differentiated, and the
    kernel has no forward mode.
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


def has_weight_norm(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of these modules, not those below them, normalises a weight."""
    return any(
        type(module).__name__ == "_WeightNorm"
        or any(type(hook).__name__ == "WeightNorm" for hook in module._forward_pre_hooks.values())
        for module in modules
    )


def is_once_differentiable(function: Any) -> bool:
    """Return whether the backward pass of an `autograd.Function` is `@once_differentiable`.

    Its gradient has no edge to the inputs, so that torch takes second derivatives for zero. A
    transform makes a Function of its own around the user's.
    """
    backward = getattr(function, "backward", None)
    if getattr(backward, "__code__", None) is _ONCE:
        return True
    cells = getattr(backward, "__closure__", None) or ()
    user = next((c.cell_contents for c in cells if isinstance(c.cell_contents, type)), function)
    return user is not function and is_once_differentiable(user)


def correct_second_derivatives(values: Iterable[Tensor], params: Iterable[Tensor]) -> list[str]:
    """Let a backward pass from `values` to `params` have right derivatives itself.

    A node of weight_norm gets a hook that returns its gradient from differentiable operations.

    Returns:
        The names of operations that cannot be corrected.
    """
    wrong: list[str] = []
    seen: set[Any] = {p.grad_fn for p in params}
    seen.add(None)
    pending: list[Any] = [x.grad_fn for x in values]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node)
        if kind is _WEIGHT_NORM:
            if not node.metadata.get(__name__):
                node.metadata[__name__] = True
                node.register_hook(_gradient_of_weight_norm(node))
        elif issubclass(kind, BackwardCFunction):
            function: Any = getattr(kind, "_forward_cls", None)
            if _CONSTANT in kind.__name__:
                wrong.append(f"{_CONSTANT} in chunks")
            elif is_once_differentiable(function):
                wrong.append(f"{function.__name__}, once_differentiable")
        pending += [following for following, _ in node.next_functions]
    return wrong


def _gradient_of_weight_norm(node: Any) -> Callable[..., Any]:
    v, g, dim = node._saved_v, node._saved_g, node._saved_dim
    others = [d for d in range(v.ndim) if d != dim % v.ndim]

    def hook(found: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> Any:
        if not torch.is_grad_enabled() or given[0] is None:
            return found
        norm = torch.norm_except_dim(v, 2, dim)
        along = (given[0] * v).sum(others, keepdim=True) / norm
        right = (g / norm * (given[0] - v * (along / norm)), along)
        return tuple(None if x is None else y for x, y in zip(found, right))

    return hook
