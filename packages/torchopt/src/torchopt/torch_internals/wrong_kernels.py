# SPDX-License-Identifier: Apache-2.0
"""Operations of torch whose second derivative is wrong silently (2.13 and before)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.autograd.graph import get_gradient_edge

__all__ = [
    "correct_second_derivatives",
    "is_once_differentiable",
    "weight_norm",
]

_WEIGHT_NORM: Any = getattr(torch._C._functions, "WeightNormInterfaceBackward0", None)
_CONSTANT = "linear_cross_entropy"  # computed in chunks: its gradient counts as a constant
_ONCE = once_differentiable(lambda ctx: None).__code__
_TRANSFORMED = "torch._functorch.autograd_function"

# The classes of nodes that need no second look. Each step of an inner loop walks its graph.
_RIGHT: set[type] = set()


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return `torch._weight_norm(v, g, dim)`, g v / ‖v‖, from operations with right derivatives.

    The backward pass of torch's kernel treats ‖v‖ as a constant when it is differentiated, and the
    kernel has no forward mode.
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


def is_once_differentiable(function: Any) -> bool:
    """Return whether the backward pass of an `autograd.Function` is `@once_differentiable`.

    Its gradient has no edge to the inputs, so torch's second derivatives are zero. A
    transform makes a Function of its own around the user's.
    """
    for name in ("backward", "vjp"):
        backward: Any = getattr(function, name, None)
        if getattr(backward, "__module__", None) == _TRANSFORMED:
            user = inspect.getclosurevars(backward).nonlocals.get("autograd_function")
            return is_once_differentiable(user)
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE:
                return True
            backward = getattr(backward, "__wrapped__", None)  # of custom_bwd, say
    return False


def correct_second_derivatives(
    values: Iterable[Tensor], params: Iterable[Tensor], others: Iterable[Tensor] = ()
) -> list[tuple[str, bool]]:
    """Let a backward pass from `values` to `params` have right derivatives itself.

    A node of weight_norm gets a hook that returns its gradient from differentiable operations.
    What `others` were computed from is not looked at.

    Returns:
        Operations between them that cannot be corrected: the name, and whether torch has the wrong
        derivative itself; otherwise a Function of the user has none.
    """
    params = [p for p in params if p.requires_grad]
    ends = {x.grad_fn for x in (*params, *others)}
    nodes = _nodes({x.grad_fn for x in values}, ends | {None})
    if _RIGHT.issuperset(map(type, nodes)):
        return []
    wrong: dict[Any, tuple[str, bool]] = {}
    for node in nodes:
        kind = type(node)
        if kind is _WEIGHT_NORM:
            _correct_weight_norm(node)
        elif not issubclass(kind, BackwardCFunction):
            _RIGHT.add(kind)
        else:
            function: Any = getattr(kind, "_forward_cls", None)
            if _CONSTANT in kind.__name__:
                wrong[node] = f"{_CONSTANT} in chunks", True
            elif is_once_differentiable(function):
                wrong[node] = f"{function.__name__}, once_differentiable", False
    if not wrong:
        return []
    users: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            users.setdefault(following, []).append(node)
    twice = [get_gradient_edge(p).node for p in params]  # what is not above them: once
    for node in twice:
        twice += users.pop(node, ())
    return [*dict.fromkeys(wrong[node] for node in twice if node in wrong)]


def _nodes(starts: set[Any], ends: set[Any]) -> list[Any]:
    """Return the nodes of a graph between its starts and its ends."""
    nodes, seen = list(starts - ends), starts | ends
    for node in nodes:
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                nodes.append(following)
    return nodes


def _correct_weight_norm(node: Any) -> None:
    if node.metadata.get(__name__):
        return
    try:
        hook = _gradient_of_weight_norm(node)
    except RuntimeError:  # freed, or written to since: torch refuses a backward pass, too
        return
    node.metadata[__name__] = True
    node.register_hook(hook)


def _gradient_of_weight_norm(node: Any) -> Callable[..., Any]:
    v, g, dim = node._saved_v, node._saved_g, node._saved_dim
    others = [d for d in range(v.ndim) if d != dim % v.ndim]

    def hook(found: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> Any:
        if not torch.is_grad_enabled() or given[0] is None:
            return found
        norm = torch.norm_except_dim(v, 2, dim)
        product = given[0] * v
        along = (product.sum(others, keepdim=True) if others else product) / norm
        right = (g / norm * (given[0] - v * (along / norm)), along)
        return tuple(None if x is None else y for x, y in zip(found, right))

    return hook
