# SPDX-License-Identifier: Apache-2.0
"""A plain unrolled loop, and a problem to run it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import torchopt
from torchopt.tree import tree_leaves, tree_map

Loop = Callable[..., tuple[Any, Tensor, Any]]


def problem(tasks: int | None = None) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
    """Return parameters (one unused, one 0-dim), a batch, and an argument of the loss."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    many = () if tasks is None else (tasks,)
    params = {"b": draw(3), "s": draw(), "unused": draw(2), "w": draw(4, 3)}
    return params, (draw(*many, 5, 4), draw(*many, 5, 3)), draw(3)


def loss_of(params: Any, batch: Any, scale: Tensor) -> Tensor:
    """Return a smooth loss of all parameters but one."""
    x, y = batch
    return ((torch.tanh(x @ params["w"] + params["b"]) * params["s"] - y * scale) ** 2).mean()


def unrolled(
    loss: Any,
    optimizer: Any,
    params: Any,
    batches: Sequence[Any],
    *meta: Any,
    window: int | None = None,
    first_order: bool = False,
    state: Any = None,
) -> tuple[Any, Tensor, Any]:
    """Return the parameters, losses and state after one step for each batch, with their graph."""
    state = optimizer.init(params) if state is None else state
    first = 0 if window is None else max(0, len(batches) - window)
    losses = []
    for t, batch in enumerate(batches):
        if t <= first and first > 0:
            params = tree_map(lambda x: x.detach().requires_grad_(), params)
            state = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, state)
        leaves = tree_leaves(params)
        leaves = [x if x.requires_grad else x.requires_grad_() for x in leaves]
        value = loss(params, batch, *meta)
        grads = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        if first_order or t < first:
            grads = tuple(None if g is None else g.detach() for g in grads)
        given = torchopt.tree.tree_unflatten(torchopt.tree.tree_structure(params), grads)
        updates, state = optimizer.update(given, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
        losses.append(value.detach() if t < first else value)
    return params, torch.stack(losses), state


def outer(params: Any, losses: Tensor, state: Any = ()) -> Tensor:
    """Return a number that depends on everything a loop returns."""
    total = (losses**2).sum() + losses.sum()
    for x in (*tree_leaves(params), *tree_leaves(state)):
        if isinstance(x, Tensor) and x.is_floating_point():
            total = total + (x**3).sum()
    return total


def worst(expected: Sequence[Any], got: Sequence[Any], like: Sequence[Tensor]) -> float:
    """Return the largest error of gradients, relative to the largest entry of each; None is 0."""
    errors = []
    for x, y, z in zip(expected, got, like, strict=True):
        x, y = (torch.zeros_like(z) if g is None else g for g in (x, y))
        errors.append(((x - y).abs().max() / (1 + x.abs().max())).item())
    return max(errors)
