# SPDX-License-Identifier: Apache-2.0
"""Run losses whose second derivatives are needed on operations that have second derivatives."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from torchopt.diff.attention import attention
from torchopt.diff.hooks import unchanging, watch_hooks
from torchopt.diff.recurrence import elementary
from torchopt.diff.sealed import EXCHANGED, RECURRENT
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import (
    checkpoint_of,
    correct_second_derivatives,
    count_transforms,
    forward_mode_enabled,
    has_tangent,
    in_forward_mode,
    inner_transforms_are_vmaps,
    is_batched,
    is_checkpoint_in_transform,
    is_once_differentiable,
    is_traced,
    recompute_in,
    saved_tensor_hooks_allowed,
    set_forward_mode,
    top_saved_tensor_hooks,
    vmap_again,
    weight_norm,
    with_forward_mode,
    without_recurrent_kernels,
    without_saved_tensor_hooks,
)
from torchopt.tree import tree_leaves
from torchopt.tree_function import is_differentiated, is_transforming

__all__ = [
    "OnceDifferentiable",
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
    """Raise if torch would return zero as a second derivative; correct the graph where possible.

    Args:
        values: The results of the function, in grad mode.
        args: The tensors that it is differentiated by.
        where: The beginning of the message.
        others: Further tensors at which the search of the graph ends.

    Raises:
        NotDifferentiableError: An operation in the graph can be differentiated only once.
    """
    wrong = correct_second_derivatives(values, args, others)
    if wrong:
        raise NotDifferentiableError(
            f"{where}: expected operations that can be differentiated twice, got {wrong[0][0]}, "
            "whose second derivative is zero in torch; write its backward in differentiable "
            'operations, or use derivative="differences" or "first_order"'
        )


class _Recomputing(TorchFunctionMode):
    """A context in which activation checkpoints work in transforms of torch.func.

    In a single vmap they recompute, in that vmap. In other transforms, where torch refuses them,
    they keep what they would otherwise recompute.
    """

    def __enter__(self) -> Any:
        """Enter the context."""
        self._hooks = contextlib.ExitStack()
        if is_transforming():
            self._hooks.enter_context(saved_tensor_hooks_allowed())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Leave the context."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._hooks.close()
        if isinstance(error, RuntimeError) and is_checkpoint_in_transform(error):
            raise NotDifferentiableError(
                "checkpoint: expected use_reentrant=False in a transform of torch.func, got a "
                "checkpoint with use_reentrant=True, which torch refuses there"
            ) from error

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or its replacement."""
        kwargs = kwargs or {}
        if not is_transforming() or top_saved_tensor_hooks(True) is None:
            return self.run(func, args, kwargs)
        again = vmap_again()
        if again is not None:  # the backward pass is outside of the vmap
            recompute_in(lambda function: again(_inside(type(self), function)))
            return self.run(func, args, kwargs)
        with without_saved_tensor_hooks() as hooks:
            if not all(checkpoint_of(pack) for pack, _ in hooks):
                raise NotDifferentiableError(
                    "expected no hooks for saved tensors in a transform of torch.func, got "
                    "torch.autograd.graph.saved_tensors_hooks, which torch refuses there; leave "
                    "them out, or differentiate by backward()"
                )
            return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation, or its replacement."""
        raise NotImplementedError


class TwiceDifferentiable(_Recomputing):
    """A context in which attention, recurrent layers and weight_norm have all derivatives.

    It avoids fast kernels whose second derivative or forward mode is missing or wrong. Attention
    runs as `attention`; LSTM, GRU and RNN run without mkldnn; `weight_norm` runs as elementary
    operations; `linear_cross_entropy` is not split into chunks. In forward mode `mse_loss` runs as
    elementary operations; so do recurrent layers and packed sequences where torch has no rule.

    A constant in reverse mode is also a constant in forward mode. torch itself lets tangents pass
    through `torch.no_grad()`, mostly by views, and through gradients that are taken without a
    graph.
    """

    def __init__(self) -> None:
        """Start without changing forward mode."""
        super().__init__()
        self._paused = self._has_tangents = False
        self._level = self._paused_at = 0
        self._nodes: list[Any] = []  # nodes of graphs that may get hooks

    def __enter__(self) -> Any:
        """Enter the context."""
        self._has_tangents = in_forward_mode()  # not a forward mode that begins inside
        self._level = max(count_transforms(), 1)  # lower levels are checked on their whole graphs
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Leave the context."""
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._pause(False)
            for node in self._nodes:
                watch_hooks(node)
            self._nodes = []

    def _pause(self, paused: bool) -> None:
        """Switch forward mode off, or on again if this context switched it off."""
        if paused and forward_mode_enabled():
            set_forward_mode(False)
            self._paused, self._paused_at = True, count_transforms()
        elif not paused and self._paused:
            set_forward_mode(True)
            self._paused = False

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation, or its replacement."""
        name = getattr(func, "__name__", None)
        if self._paused and torch.is_grad_enabled() and count_transforms() == self._paused_at:
            self._pause(False)  # no_grad ended unnoticed, in a Function where torch saves a tensor
        if name not in _LOOKED_AT:  # nearly all
            if self._has_tangents and name in _SUMS:
                args = _with_zeros(args)
            found = func(*args, **kwargs)
            if self._paused and inner_transforms_are_vmaps(self._paused_at):
                return _without_tangent(found, args)
            if name == "__get__" and found is not None:
                if func == _NODE:
                    self._nodes.append(found)
                elif self._has_tangents and func == _GRADIENT:
                    return found if found.requires_grad else found.detach()
            return found
        recompute_in(twice_differentiable)  # so that a checkpoint runs the same operations
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
            # It is written in Python, and torch does not call modes inside it.
            return _with_attention(func)(*args, **kwargs)
        exchanged = elementary(name, args, kwargs)
        if exchanged is not None:
            return exchanged(func, *args, **kwargs)
        if name in RECURRENT:
            with without_recurrent_kernels():
                return func(*args, **kwargs)
        if name == "_weight_norm":
            return weight_norm(*args, **kwargs)
        if name == "mse_loss":
            return (
                _mean_square(func, *args, **kwargs) if in_forward_mode() else func(*args, **kwargs)
            )
        if name == "linear_cross_entropy":
            return func(*args, **{**kwargs, "options": None})
        if in_forward_mode() and "prod" in (*args[4:], kwargs.get("reduce")):
            raise NotDifferentiableError(
                'derivative="mixed" or "forward": expected operations with a correct forward mode, '
                f'got {name} with reduce="prod"; use derivative="reverse"'
            )
        return func(*args, **kwargs)

    def _switch(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Handle an operation that switches gradients on or off, or takes a gradient."""
        if name == "_set_grad_enabled":
            # A transform inside no_grad switches gradients on only for itself.
            if self._has_tangents and not (self._paused and count_transforms() > self._paused_at):
                self._pause(not args[0])
        elif kwargs.get("create_graph") or args[4:5] == (True,):
            if not is_transforming():  # in transforms `custom_function_call` is checked instead
                values, inputs = (tree_leaves(x) for x in (*args, *kwargs.values())[:2])
                require_second_derivatives(values, inputs, "torch.autograd.grad")
        elif self._has_tangents:
            with with_forward_mode(False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class OnceDifferentiable(_Recomputing):
    """A context for first derivatives of a loss in a transform of torch.func.

    Only what torch cannot run in a transform is changed, recurrent layers, packed sequences and
    checkpoints; fast kernels and hooks are left alone.
    """

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation, or its replacement."""
        exchanged = elementary(getattr(func, "__name__", None), args, kwargs)
        return func(*args, **kwargs) if exchanged is None else exchanged(func, *args, **kwargs)


def _mean_square(function: Any, x: Tensor, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return `mse_loss`; the forward mode of its mean fails if one argument has no tangent."""
    given = {k: v for k, v in kwargs.items() if v is not None}
    if not args and given in ({}, {"reduction": "mean"}) and x.shape == y.shape:
        return (x - y).square().mean()
    found: Tensor = function(x, y, *args, **kwargs)
    return found


def _without_tangent(found: Any, args: Any) -> Any:
    """Return the result of an operation as a constant; a view would have its base's tangent."""
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
    """Return a copy of a function of torch that calls `attention`, without patching torch."""
    own = {**function.__globals__, "scaled_dot_product_attention": attention}
    made = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    own[function.__name__] = made  # it passes itself on to subclasses of tensors
    return made


_SUMS = {"add", "sub"}


def _with_zeros(terms: Any) -> Any:
    """Return two terms, of which both have tangents if one has.

    For a tangent that is missing, torch asks a function in Python for shapes.
    """
    if len(terms) != 2 or not all(type(x) is Tensor and x.is_contiguous() for x in terms):
        return terms
    x, y = terms
    if x.dtype != y.dtype or not x.is_floating_point() or is_traced() or is_transforming():
        return terms
    has = has_tangent(x), has_tangent(y)
    if has[0] == has[1]:
        return terms
    bare = terms[has[0]]
    filled = forward_ad.make_dual(bare, torch.zeros_like(bare))
    return (x, filled) if has[0] else (filled, y)


_GRADIENT: Any = vars(Tensor.__base__)["grad"].__get__  # the getter of `x.grad`
_NODE: Any = vars(Tensor.__base__)["grad_fn"].__get__
_SWITCHES = {"_set_grad_enabled", "grad"}
_LOOKED_AT = EXCHANGED | _SWITCHES | {"custom_function_call", "register_hook"}


def twice_differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with each call inside `TwiceDifferentiable`."""
    return _inside(TwiceDifferentiable, function)


def _inside(context: type[TorchFunctionMode], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return run
