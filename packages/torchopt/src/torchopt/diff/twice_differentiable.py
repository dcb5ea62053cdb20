# SPDX-License-Identifier: Apache-2.0
"""Losses of which second derivatives are taken run on operations that have them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

from torchopt.diff.explicit.attention import attention
from torchopt.torch_internals import (
    forward_mode_enabled,
    in_forward_mode,
    set_forward_mode,
    weight_norm,
    with_forward_mode,
    without_recurrent_kernels,
)

__all__ = ["EXCHANGED", "TwiceDifferentiable", "twice_differentiable"]


class TwiceDifferentiable(TorchFunctionMode):
    """A context in which attention, recurrent layers and weight_norm have all their derivatives.

    Fast kernels without a second derivative or without a forward mode, or with a wrong one, are
    avoided: attention is `attention`, LSTM, GRU and RNN run without mkldnn, `weight_norm` is
    written out, `linear_cross_entropy` is not computed in chunks.

    What is a constant in reverse mode is one in forward mode too: torch lets tangents through
    `torch.no_grad()`, and through gradients that are taken without a graph.
    """

    def __init__(self) -> None:
        """Begin with forward mode as it is."""
        super().__init__()
        self._paused = self._has_tangents = False

    def __enter__(self) -> TwiceDifferentiable:
        """Enter the context."""
        self._has_tangents = in_forward_mode()  # one that begins inside is not this one's
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the context."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._pause(False)

    def _pause(self, paused: bool) -> None:
        """Switch forward mode off, or on again if it was this that switched it off."""
        if paused and forward_mode_enabled():
            set_forward_mode(False)
            self._paused = True
        elif not paused and self._paused:
            set_forward_mode(True)
            self._paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, or its replacement."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", None)
        if self._has_tangents and name in _SWITCHES:
            if name == "_set_grad_enabled":
                self._pause(not args[0])
            elif not (kwargs.get("create_graph") or args[4:5] == (True,)):
                with with_forward_mode(False):
                    return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            return attention(*args, **kwargs)
        if name == "multi_head_attention_forward":
            # Written in Python: torch does not call modes inside of it.
            return _with_attention(func)(*args, **kwargs)
        if name in _RECURRENT:
            with without_recurrent_kernels():
                return func(*args, **kwargs)
        if name == "_weight_norm":
            return weight_norm(*args, **kwargs)
        if name == "linear_cross_entropy":
            return func(*args, **{**kwargs, "options": None})
        return func(*args, **kwargs)


def _with_attention(function: Any) -> Callable[..., Any]:
    """Return a function of torch that calls `attention` in this thread alone."""
    own = {**function.__globals__, "scaled_dot_product_attention": attention}
    made = types.FunctionType(function.__code__, own, function.__name__, function.__defaults__)
    made.__kwdefaults__ = function.__kwdefaults__
    own[function.__name__] = made  # which a subclass of tensors is handed
    return made


_SWITCHES = {"_set_grad_enabled", "grad"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}
EXCHANGED = frozenset(
    {
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
        "_weight_norm",
        "linear_cross_entropy",
        *_RECURRENT,
    }
)


def twice_differentiable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose calls are inside of `TwiceDifferentiable`."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with TwiceDifferentiable():
            return function(*args, **kwargs)

    return run
