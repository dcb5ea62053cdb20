# SPDX-License-Identifier: Apache-2.0
"""Losses of which second derivatives are taken run on operations that have them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchopt.diff.explicit.attention import attention
from torchopt.diff.hooks import unchanging, watch_hooks
from torchopt.diff.sealed import EXCHANGED, RECURRENT
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import (
    correct_second_derivatives,
    count_transforms,
    forward_mode_enabled,
    in_forward_mode,
    inner_transforms_are_vmaps,
    is_batched,
    is_once_differentiable,
    recompute_in,
    set_forward_mode,
    top_saved_tensor_hooks,
    vmap_again,
    weight_norm,
    with_forward_mode,
    without_recurrent_kernels,
)
from torchopt.tree import tree_leaves
from torchopt.tree_function import is_differentiated, is_transforming

__all__ = [
    "TwiceDifferentiable",
    "require_second_derivatives",
    "twice_differentiable",
]


def require_second_derivatives(
    values: Sequence[Tensor],
    args: Sequence[Tensor],
    where: str,
    others: Sequence[Tensor] = (),
) -> None:
    """Raise if torch would return zero as a second derivative; correct what can be.

    Args:
        values: What the function returned, in grad mode.
        args: What it is differentiated by.
        where: What the message starts with.
        others: What else its graph is not followed beyond.

    Raises:
        NotDifferentiableError: An operation behind them can be differentiated once only.
    """
    wrong = correct_second_derivatives(values, args, others)
    if wrong:
        raise NotDifferentiableError(
            f"{where}: expected operations that can be differentiated twice, got {wrong[0][0]}, "
            "whose second derivative is zero in torch; write its backward in differentiable "
            'operations, or use derivative="differences" or "first_order"'
        )


class TwiceDifferentiable(TorchFunctionMode):
    """A context in which attention, recurrent layers and weight_norm have all their derivatives.

    Fast kernels without a second derivative or without a forward mode, or with a wrong one, are
    avoided: attention is `attention`, LSTM, GRU and RNN run without mkldnn, `weight_norm` is
    written out, `linear_cross_entropy` is not computed in chunks.

    What is a constant in reverse mode is one in forward mode too: torch lets tangents through
    `torch.no_grad()`, views above all, and through gradients that are taken without a graph.
    """

    def __init__(self) -> None:
        """Begin with forward mode as it is."""
        super().__init__()
        self._paused = self._has_tangents = False
        self._level = self._paused_at = 0
        self._nodes: list[Any] = []  # of graphs, that may be given hooks

    def __enter__(self) -> TwiceDifferentiable:
        """Enter the context."""
        self._has_tangents = in_forward_mode()  # one that begins inside is not this one's
        self._level = max(count_transforms(), 1)  # the graphs below are looked at as a whole
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the context."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._pause(False)
        for node in self._nodes:
            watch_hooks(node)
        self._nodes = []

    def _pause(self, paused: bool) -> None:
        """Switch forward mode off, or on again if it was this that switched it off."""
        if paused and forward_mode_enabled():
            set_forward_mode(False)
            self._paused, self._paused_at = True, count_transforms()
        elif not paused and self._paused:
            set_forward_mode(True)
            self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or its replacement."""
        name = getattr(func, "__name__", None)
        if self._paused and torch.is_grad_enabled() and count_transforms() == self._paused_at:
            self._pause(False)  # a Function, where torch saves a tensor, ended silently
        if is_transforming() and top_saved_tensor_hooks(True) is not None:
            _recompute_as_batch()
        if name not in _LOOKED_AT:  # nearly all
            found = func(*args, **(kwargs or {}))
            if self._paused and inner_transforms_are_vmaps(self._paused_at):
                return _without_tangent(found, args)
            if name == "__get__" and found is not None:
                if func == _NODE:
                    self._nodes.append(found)
                elif self._has_tangents and func == _GRADIENT:
                    return found if found.requires_grad else found.detach()
            return found
        kwargs = kwargs or {}
        recompute_in(twice_differentiable)  # a checkpoint, with the same operations
        if name == "register_hook":
            hook = kwargs["hook"] if len(args) < 2 else args[1]
            return func(args[0], unchanging(hook))
        if name in _SWITCHES:
            return self._switch(func, name, args, kwargs)
        if name == "custom_function_call":
            if is_once_differentiable(args[0]):
                _require_constant(self._level, *args)
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return attention(*args, **kwargs)
        if name == "multi_head_attention_forward":
            # Written in Python: torch does not call modes inside of it.
            return _with_attention(func)(*args, **kwargs)
        if name in RECURRENT:
            with without_recurrent_kernels():
                return func(*args, **kwargs)
        if name == "_weight_norm":
            return weight_norm(*args, **kwargs)
        if name == "linear_cross_entropy":
            return func(*args, **{**kwargs, "options": None})
        if in_forward_mode() and "prod" in (*args[4:], kwargs.get("reduce")):
            raise NotDifferentiableError(
                'derivative="mixed" or "forward": expected operations with a right forward mode, '
                f'got {name} with reduce="prod"; use derivative="reverse"'
            )
        return func(*args, **kwargs)

    def _switch(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Switch gradients on or off, or take one."""
        if name == "_set_grad_enabled":
            # A transform inside of no_grad switches gradients on for itself alone.
            if self._has_tangents and not (self._paused and count_transforms() > self._paused_at):
                self._pause(not args[0])
        elif kwargs.get("create_graph") or args[4:5] == (True,):
            if not is_transforming():  # where `custom_function_call` is looked at
                values, inputs = (tree_leaves(x) for x in (*args, *kwargs.values())[:2])
                require_second_derivatives(values, inputs, "torch.autograd.grad")
        elif self._has_tangents:
            with with_forward_mode(False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _recompute_as_batch() -> None:
    """Let a checkpoint in a vmap be recomputed in one: its backward pass is outside."""
    again = vmap_again()
    if again is not None:
        recompute_in(lambda function: again(twice_differentiable(function)))


def _without_tangent(found: Any, args: Any) -> Any:
    """Return what an operation gave where it is a constant: a view has its base's tangent."""
    if type(found) in (tuple, list):
        return type(found)(_without_tangent(x, args) for x in found)
    if not isinstance(found, Tensor) or any(found is x for x in args):
        return found
    return found.detach() if found._is_view() or is_batched(found) else found


def _require_constant(level: int, function: Any, *args: Any) -> None:
    """Raise if a Function that is once_differentiable is differentiated by torch.func."""
    if any(isinstance(x, Tensor) and is_differentiated(x, level) for x in args):
        raise NotDifferentiableError(
            f"{function.__name__}: expected a Function that can be differentiated twice, got one "
            "that is once_differentiable, whose second derivative is zero in torch; write its "
            "backward in differentiable operations"
        )


def _with_attention(function: Any) -> Callable[..., Any]:
    """Return a function of torch that calls `attention` only in this thread."""
    own = {**function.__globals__, "scaled_dot_product_attention": attention}
    made = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    own[function.__name__] = made  # which a subclass of tensors is handed
    return made


_GRADIENT: Any = vars(Tensor.__base__)["grad"].__get__  # the getter of `x.grad`
_NODE: Any = vars(Tensor.__base__)["grad_fn"].__get__
_SWITCHES = {"_set_grad_enabled", "grad"}
_LOOKED_AT = EXCHANGED | _SWITCHES | {"custom_function_call", "register_hook"}


def twice_differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose calls are inside of `TwiceDifferentiable`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with TwiceDifferentiable():
            return function(*args, **kwargs)

    return run
