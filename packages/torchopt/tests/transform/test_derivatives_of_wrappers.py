# SPDX-License-Identifier: Apache-2.0
"""Derivatives through steps of wrapped optimizers: reverse, forward, second order, batched, and
against differences of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.clip import adaptive_clip, clip_each_norm
from torchopt.pytree import tree_flatten, tree_unflatten
from torchopt.transform import (
    accumulate,
    centralize,
    ema,
    freeze,
    in_precision,
    inject_hyperparams,
    lookahead,
    masked,
    partition,
)

DOUBLE = torch.float64
STEPS = 4


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


PARAMS = {
    "a": {"v": randn(2, 2, seed=1), "w": randn(3, 2, seed=2)},
    "b": randn(3, seed=3),
    "s": randn(seed=4),
}
HALF = {"a": True, "b": False, "s": True}
LEAVES, SPEC = tree_flatten(PARAMS)
SIZES = [x.numel() for x in LEAVES]
START = torch.cat([*(x.reshape(-1) for x in LEAVES), torch.tensor([0.3, 0.7], dtype=DOUBLE)])
COTANGENT = randn(sum(SIZES), seed=5)


def adam() -> Any:
    return torchopt.adam(0.05, eps=1e-2)


def momentum() -> Any:
    return torchopt.sgd(0.05, momentum=0.9, dampening=0.3, weight_decay=0.1)


WRAPPERS: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "masked": lambda make: masked(make(), HALF),
    "partition": lambda make: partition(
        {"x": make(), "y": torchopt.alias.yogi(0.03, eps=1e-2)},
        {"a": {"v": "y", "w": "x"}, "b": "y", "s": "x"},
    ),
    "lookahead": lambda make: lookahead(make(), 2, 0.4),
    "accumulate": lambda make: accumulate(make(), 2),
    "freeze": lambda make: torchopt.chain(make(), freeze(HALF)),
    "clipped": lambda make: torchopt.chain(
        torchopt.clip_grad_norm(0.7, differentiable=True), make()
    ),
    "clipped, flat": lambda make: torchopt.chain.flat(
        torchopt.clip_grad_norm(0.7, differentiable=True), make()
    ),
    "each clipped": lambda make: torchopt.chain(clip_each_norm(0.5), make()),
    "unit-wise clipped": lambda make: torchopt.chain(adaptive_clip(0.1), make()),
    "ema": lambda make: torchopt.chain(make(), ema(0.6)),
    "centralized": lambda make: torchopt.chain(centralize(), make()),
    "nested": lambda make: lookahead(accumulate(masked(make(), HALF), 2), 3, 0.5),
    "in precision": lambda make: in_precision(make(), DOUBLE),
    "injected": lambda make: inject_hyperparams(torchopt.adamw)(
        lr=0.05, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1
    ),
    "masked decay": lambda make: torchopt.adamw(0.05, eps=1e-2, weight_decay=0.3, mask=HALF),
}
CASES = [
    *((name, adam) for name in sorted(WRAPPERS)),
    *((name, momentum) for name in sorted(set(WRAPPERS) - {"injected", "masked decay"})),
]


def inner_loss(params: Any, scales: Tensor) -> Tensor:
    v, w, b, s = params["a"]["v"], params["a"]["w"], params["b"], params["s"]
    return (
        scales[0] * (w @ v).square().sum()
        + scales[1] * torch.sin(b).sum() * s
        + 0.1 * s.square()
        + 0.3 * (w.T @ b).square().sum()
    )


def trained(optimizer: Any) -> Callable[[Tensor], Tensor]:
    """Return the map from parameters and loss scales, one vector, to a number after the steps."""

    def run(z: Tensor) -> Tensor:
        parts = z[:-2].split(SIZES)
        params = tree_unflatten(SPEC, [x.view_as(leaf) for x, leaf in zip(parts, LEAVES)])
        state = optimizer.init(params)
        for _ in range(STEPS):
            grads = torch.func.grad(inner_loss)(params, z[-2:])
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return torch.cat([x.reshape(-1) for x in tree_flatten(params)[0]]) @ COTANGENT

    return run


@pytest.mark.parametrize(
    ("name", "make"), CASES, ids=[f"{name}-{make.__name__}" for name, make in CASES]
)
def test_derivatives_of_wrapped_optimizers(name: str, make: Callable[[], Any]) -> None:
    f = trained(WRAPPERS[name](make))
    gradient = torch.func.grad(f)
    direction = randn(START.numel(), seed=6)
    slope = gradient(START)
    assert slope.abs().max() > 1e-3

    # Fourth order in h = 1e-4: an error of some h^4, and of 1e-16 / h from rounding.
    h = 1e-4
    ahead, behind, far, back = (f(START + k * h * direction) for k in (1, -1, 2, -2))
    difference = (8 * (ahead - behind) - (far - back)) / (12 * h)
    torch.testing.assert_close(slope @ direction, difference, rtol=1e-7, atol=1e-8)

    _, forward = torch.func.jvp(f, (START,), (direction,))
    torch.testing.assert_close(forward, slope @ direction, rtol=1e-11, atol=1e-11)

    z = START.clone().requires_grad_()
    (tracked,) = torch.autograd.grad(f(z), z, create_graph=True)
    torch.testing.assert_close(tracked.detach(), slope, rtol=1e-11, atol=1e-11)
    (curved,) = torch.autograd.grad(tracked @ direction, z)
    ahead, behind, far, back = (gradient(START + k * h * direction) for k in (1, -1, 2, -2))
    difference = (8 * (ahead - behind) - (far - back)) / (12 * h)
    torch.testing.assert_close(curved, difference, rtol=1e-6, atol=1e-6)

    batch = torch.stack([START, START + 0.01 * direction])
    each = torch.stack([gradient(row) for row in batch])
    torch.testing.assert_close(torch.func.vmap(gradient)(batch), each, rtol=1e-11, atol=1e-11)
