# SPDX-License-Identifier: Apache-2.0
"""Checks of the arguments of an inner loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from torchopt.errors import NotDifferentiableError
from torchopt.tree import tree_leaves, tree_structure

__all__ = [
    "batches_of",
    "explain_arguments",
    "leading",
    "require_count",
    "require_length",
    "require_no_differences",
    "require_no_iterable",
    "require_place",
    "require_tasks",
]


def explain_arguments(loss: Callable[..., Any], count: int, error: TypeError) -> None:
    """Raise a clear error from `error` if the loss does not take `count` arguments."""
    try:
        signature = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except ValueError:  # of a builtin
        return
    try:
        signature.bind(*range(count))
    except TypeError:
        further = ", *meta" * (count > 2)
        advice = "take the batch too, even if it is None"
        if isinstance(loss, nn.Module):
            advice = (
                "write a function whose loss calls torchopt.params.functional_call(module, params, "
                "inputs)"
            )
        raise TypeError(
            f"inner_loop: loss: expected a function of {count} arguments, (params, batch{further})"
            f", got {getattr(loss, '__name__', type(loss).__name__)}{signature}; {advice}."
        ) from error


def leading(batches: Any) -> set[int]:
    """Return the sizes of the leading dimensions of a tree."""
    leaves = tree_leaves(batches)
    return {x.shape[0] if isinstance(x, Tensor) and x.ndim else 0 for x in leaves}


def require_length(found: int, steps: int, what: str) -> None:
    """Raise unless there is one batch for each step."""
    if found != steps:
        raise ValueError(
            f"inner_loop: batches: expected {what} length {steps}, one batch for each step, got "
            f"{found}."
        )


def require_no_iterable(batches: Any) -> None:
    """Raise for a DataLoader or a generator, which may yield its batches only once."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        return
    if tree_structure(batches).is_leaf():
        raise TypeError(
            "inner_loop: batches: expected a list of batches or a tree of stacked tensors, got "
            f"{type(batches).__name__}; pass list(...) of what it yields, one for each step."
        )


def batches_of(batch: Any, batches: Any, steps: int) -> tuple[Sequence[Any], bool]:
    """Return one batch, or one for each step, and whether the one batch is stacked by steps."""
    if batches is None:
        return (batch,), False
    if batch is not None:
        raise TypeError(
            "inner_loop: expected a batch for all steps or batches=, one for each step, got both."
        )
    if isinstance(batches, (list, tuple)) and not hasattr(batches, "_fields"):
        stacked = leading(batches) == {steps}
        if stacked and isinstance(batches, tuple) and len(batches) == steps:
            raise ValueError(
                f"inner_loop: batches: expected a tuple that is either one batch for each of "
                f"{steps} steps or a tree of tensors with a leading dimension of "
                f"{steps}, got one that is both; pass a list of batches, or a dict of "
                "stacked tensors."
            )
        if not stacked or len(batches) == steps:
            require_length(len(batches), steps, "a sequence of")
            return tuple(batches), False
    require_no_iterable(batches)
    lengths = leading(batches)
    if lengths != {steps}:
        require_length(min(lengths - {steps}, default=0), steps, "tensors of")
    return (batches,), True


def require_count(value: Any, what: str) -> None:
    """Raise unless a value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"inner_loop: {what}: expected an int, got {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"inner_loop: {what}: expected at least 1, got {value}.")


def require_tasks(tasks: Any) -> None:
    """Raise unless there are dimensions for several arguments, or None."""
    if tasks is not None and not isinstance(tasks, (tuple, list)):
        raise TypeError(
            "inner_loop: tasks: expected a tuple with a dimension, or None, for params, batch and "
            f"each further argument, such as (None, 0), got {type(tasks).__name__}."
        )
    for dim in tree_leaves(tasks):
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(
                "inner_loop: tasks: expected ints, or None, as the dimensions of params, batch and "
                f"each further argument, such as (None, 0), got {dim!r}."
            )


def require_place(place: str, keep: int | str, derivative: str) -> None:
    """Raise if states cannot be kept in a place."""
    if place not in ("device", "host"):
        raise ValueError(f'inner_loop: keep_on: expected "device" or "host", got {place!r}.')
    if place == "host" and keep == "all" and derivative in ("reverse", "first_order"):
        raise ValueError(
            'inner_loop: keep_on: expected "device" with keep="all", whose graph stays where it '
            'is, got "host"; use keep="steps", a number of snapshots or a budget.'
        )


def require_no_differences(call: Any, expected: str) -> None:
    """Raise if second derivatives come from differences, which cannot be differentiated."""
    if call.derivative == "differences":
        raise NotDifferentiableError(
            f"inner_loop: derivative='differences': expected {expected}, got one: differences of "
            "gradients have no derivative of their own. Use 'reverse' or 'mixed' there, and "
            "tasks= instead of vmap."
        )
