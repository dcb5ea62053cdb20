# SPDX-License-Identifier: Apache-2.0
"""Differentiable steps of SGD that are one or two of torch's own operations a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.base import GradientTransformation
from torchopt.optimizers.native import FusedChain
from torchopt.transform.trace import TraceState
from torchopt.tree_function import PLAIN, is_traced, is_transforming
from torchopt.update import apply_updates

__all__ = ["short_step", "stepped"]

# Up to so many tensors, one operation for each takes less time than a node for all of them: on a
# network of 6 small ones 13 us instead of 57, with a derivative that runs without Python.
MANY = 60

_DTYPES = frozenset((torch.float32, torch.float64))
_PLAIN = frozenset(PLAIN)
_RULES = frozenset(("sgd", "momentum", "nesterov"))


def stepped(
    transformation: GradientTransformation,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Any,
) -> tuple[Sequence[Tensor], Any]:
    """Return what `apply_updates(params, updates)` gives for the next updates, and the next state.

    Nothing is written, and everything is differentiable.

    Args:
        transformation: Any.
        params: The parameters.
        grads: Their gradients; None where there is none.
        state: The state.
    """
    found = short_step(transformation, params, grads, state)
    if found is not None:
        return found
    params = tuple(params)
    updates, state = transformation.update(tuple(grads), state, params=params, inplace=False)
    new: Any = apply_updates(params, updates, inplace=False)
    return new, state


def short_step(
    transformation: GradientTransformation,
    params: Sequence[Tensor],
    grads: Sequence[Any],
    state: Any,
) -> tuple[list[Tensor], Any] | None:
    """Return the next parameters and state; None where the step is not that of SGD with fixed
    numbers on few plain tensors.

    Args:
        transformation: Any.
        params: Leaves of the parameters.
        grads: Leaves of their gradients.
        state: The state.
    """
    chain = getattr(transformation.update, "__self__", None)
    if type(chain) is not FusedChain or chain.recipe.rule not in _RULES:
        return None
    recipe = chain.recipe
    numbers = recipe.numbers
    if numbers is None or chain.backend != "auto" or not 0 < len(params) <= MANY:
        return None
    if forward_ad._current_level >= 0 or is_transforming() or is_traced():
        return None
    if recipe.states:
        lr, decay, decoupled, momentum, dampening = numbers
        ((place, _),) = recipe.states
        traces = state.trace if chain.single else state[place].trace
        if dampening or type(traces) is not list or not _are_alike(params, traces):
            return None
    else:
        lr, decay, decoupled = numbers
        momentum, traces = 0.0, params
    if not _are_alike(params, grads):
        return None
    maximize, moves, nesterov = recipe.maximize, bool(recipe.states), recipe.rule == "nesterov"
    new, new_traces = [], []
    for p, g, t in zip(params, grads, traces):
        if maximize:
            g = g.neg()
        if decay:
            g = g.add(p, alpha=decay)
        if moves:
            t = g.add(t, alpha=momentum)
            new_traces.append(t)
            g = g.add(t, alpha=momentum) if nesterov else t
        if decoupled:
            g = g.add(p, alpha=decoupled)
        new.append(p.add(g, alpha=-lr))
    if not recipe.states:
        return new, state
    following = TraceState(new_traces)
    if chain.single:
        return new, following
    return new, (*state[:place], following, *state[place + 1 :])


def _are_alike(params: Sequence[Tensor], others: Sequence[Any]) -> bool:
    """Return whether all are plain tensors on the CPU, and pairs have one shape and dtype."""
    for p, x in zip(params, others):
        if type(x) not in _PLAIN or type(p) not in _PLAIN or p.dtype not in _DTYPES:
            return False
        if x.dtype is not p.dtype or x.shape != p.shape or not (x.is_cpu and p.is_cpu):
            return False
        if x.layout is not torch.strided:
            return False
    return len(params) == len(others)
