# SPDX-License-Identifier: Apache-2.0
"""Torch operations whose second derivative is silently wrong (in torch 2.13 and older)."""

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
_CONSTANT = "linear_cross_entropy"  # in chunks, it treats its gradient as a constant
_ONCE = once_differentiable(lambda ctx: None).__code__
_TRANSFORMED = "torch._functorch.autograd_function"

# Node classes known to be correct, because each step of an inner loop walks its graph.
_RIGHT: set[type] = set()


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Return g v / ‖v‖ as `torch._weight_norm(v, g, dim)` does, with correct derivatives.

    The backward pass of torch's kernel, when differentiated, treats ‖v‖ as a constant, and the
    kernel has no forward mode.
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


def is_once_differentiable(function: Any) -> bool:
    """Return whether the backward pass of an `autograd.Function` is `@once_differentiable`.

    The gradient of such a Function has no edge to the inputs, so torch's second derivatives are
    zero. Inside a transform, the user's Function is wrapped in one that torch generates.
    """
    for name in ("backward", "vjp"):
        backward: Any = getattr(function, name, None)
        if getattr(backward, "__module__", None) == _TRANSFORMED:
            user = inspect.getclosurevars(backward).nonlocals.get("autograd_function")
            return is_once_differentiable(user)
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE:
                return True
            backward = getattr(backward, "__wrapped__", None)  # for example under custom_bwd
    return False


def correct_second_derivatives(
    values: Iterable[Tensor], params: Iterable[Tensor], others: Iterable[Tensor] = ()
) -> list[tuple[str, bool]]:
    """Make a backward pass from `values` to `params` correctly differentiable.

    Each weight_norm node gets a hook that computes its gradient with differentiable operations.

    Args:
        values: The tensors at which the backward pass starts.
        params: The tensors at which it ends.
        others: Further tensors at which the search of the graph ends.

    Returns:
        The operations in between that cannot be corrected: the name, and True if torch's own
        derivative is wrong, False if a Function of the user has no second derivative.
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
    # Only nodes that depend on the parameters are differentiated twice.
    twice = [get_gradient_edge(p).node for p in params]
    for node in twice:
        twice += users.pop(node, ())
    return [*dict.fromkeys(wrong[node] for node in twice if node in wrong)]


def _nodes(starts: set[Any], ends: set[Any]) -> list[Any]:
    """Return the graph nodes from `starts` down to `ends`, without the ends."""
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
    # Saved tensors were freed or written to. Then torch refuses the backward pass too.
    except RuntimeError:
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
