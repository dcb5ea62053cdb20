# SPDX-License-Identifier: Apache-2.0
"""torch.func transforms of whole inner loops, over tasks, seeds, data and hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import ROWS, SMOOTH
from torch import Tensor

import torchopt

DOUBLE = torch.float64
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
# Every optimizer once, away from points where its rule has a kink.
CASES = sorted({name: case for case, (name, _) in SMOOTH.items()}.values())


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def inner_loop(name: str, settings: dict[str, Any], steps: int = 2) -> Callable[..., Tensor]:
    """Return (w [2, 1], x [4, 2], log_scale) -> loss after training on the task x."""
    optimizer = ROWS[name].functional(**settings)

    def loss(params: dict[str, Tensor], x: Tensor, log_scale: Tensor) -> Tensor:
        prediction = torch.tanh(x @ params["w"]) * params["s"]
        target = torch.sin(x.sum(dim=1, keepdim=True))
        return (prediction - target).pow(2).mean() * log_scale.exp()

    def trained(w: Tensor, x: Tensor, log_scale: Tensor) -> Tensor:
        params = {"w": w, "s": torch.ones((), dtype=DOUBLE)}
        state = optimizer.init(params)
        for _ in range(steps):
            grads = torch.func.grad(loss)(params, x, log_scale)
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return loss(params, x, torch.zeros((), dtype=DOUBLE))

    return trained


def point() -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, 1, seed=0), randn(4, 2, seed=1), torch.tensor(0.3, dtype=DOUBLE)


@pytest.mark.parametrize("case", CASES)
def test_tasks_and_seeds_are_batched_by_vmap(case: str) -> None:
    trained = inner_loop(*SMOOTH[case])
    w, _, log_scale = point()
    tasks, seeds = randn(3, 4, 2, seed=2), randn(2, 2, 1, seed=3)

    meta_grad = torch.func.grad(trained)
    over_tasks = torch.func.vmap(meta_grad, in_dims=(None, 0, None))(w, tasks, log_scale)
    expected = torch.stack([meta_grad(w, x, log_scale) for x in tasks])
    torch.testing.assert_close(over_tasks, expected, **CLOSE)
    assert expected.abs().max() > 1e-6

    both = torch.func.vmap(
        torch.func.vmap(trained, in_dims=(None, 0, None)), in_dims=(0, None, None)
    )(seeds, tasks, log_scale)
    looped = torch.stack([torch.stack([trained(s, x, log_scale) for x in tasks]) for s in seeds])
    torch.testing.assert_close(both, looped, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_an_ensemble_steps_as_its_members_do(case: str) -> None:
    """Each step is a vmap of its own, so that states come as batches, their counts too."""
    name, settings = SMOOTH[case]
    optimizer = ROWS[name].functional(**settings)
    start = {"w": randn(3, 2, 2, seed=0), "s": randn(3, 4, seed=1)}
    grads = [{"w": randn(3, 2, 2, seed=2 + k), "s": randn(3, 4, seed=5 + k)} for k in range(3)]

    def step(params: Any, state: Any, g: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(g, state, params=params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), state

    if name in ("shampoo", "soap"):  # count in numbers of Python
        with pytest.raises(ValueError, match="must only return Tensors"):
            torch.func.vmap(optimizer.init)(start)
        return
    params, state = start, torch.func.vmap(optimizer.init)(start)
    for g in grads:
        params, state = torch.func.vmap(step)(params, state, g)
    for i in range(3):
        member = {k: x[i] for k, x in start.items()}
        own = optimizer.init(member)
        for g in grads:
            member, own = step(member, own, {k: x[i] for k, x in g.items()})
        torch.testing.assert_close({k: x[i] for k, x in params.items()}, member, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_modes_of_differentiation_agree(case: str) -> None:
    trained = inner_loop(*SMOOTH[case])
    w, x, log_scale = point()
    argnums = (0, 1, 2)
    reverse = torch.func.grad(trained, argnums=argnums)(w, x, log_scale)
    tangents = (randn(2, 1, seed=4), randn(4, 2, seed=5), randn(seed=6))
    _, forward = torch.func.jvp(trained, (w, x, log_scale), tangents)
    paired = sum((g * t).sum() for g, t in zip(reverse, tangents))
    torch.testing.assert_close(forward, paired, **CLOSE)
    assert forward.abs() > 1e-8
    jacobian = torch.func.jacrev(trained, argnums=argnums)(w, x, log_scale)
    torch.testing.assert_close(jacobian, reverse, **CLOSE)

    leaves = [v.clone().requires_grad_() for v in (w, x, log_scale)]
    plain = torch.autograd.grad(trained(*leaves), leaves, create_graph=True)
    torch.testing.assert_close(list(plain), list(reverse), **CLOSE)

    hessian = torch.func.hessian(trained)(w, x, log_scale).reshape(2, 2)
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-8, atol=1e-10)
    rows = [torch.autograd.grad(g, leaves[0], retain_graph=True)[0] for g in plain[0].reshape(-1)]
    torch.testing.assert_close(hessian, torch.stack(rows).reshape(2, 2), rtol=1e-8, atol=1e-10)
