# SPDX-License-Identifier: Apache-2.0
"""Every step is differentiable, twice, with respect to its state and its hyper-parameters."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from optimizers import ROWS, SMOOTH
from torch import Tensor

import torchopt
from torchopt.pytree import tree_flatten, tree_unflatten

DOUBLE = torch.float64

# Where the default is a kink, or has no effect.
VALUES = {
    "d": 0.8, "eps": 1e-2, "eps_root": 1e-3, "momentum": 0.5, "weight_decay": 0.1,
    "initial_scale": 0.3, "initial_accumulator_value": 0.3, "initial_accumulator": 0.3,
    "lr_decay": 0.1,
}  # fmt: skip
STEPS = {"radam": 7}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def params() -> dict[str, Tensor]:
    return {"b": randn(3, seed=1), "w": randn(3, 2, seed=2)}


def gradients(step: int) -> dict[str, Tensor]:
    return {"b": randn(3, seed=10 + step), "w": randn(3, 2, seed=20 + step)}


def hypers_of(case: str) -> dict[tuple[str, int | None], float]:
    """Return the numbers among the settings: (name, index in a tuple) -> value."""
    name, settings = SMOOTH[case]
    signature = inspect.signature(ROWS[name].functional)
    values = {k: p.default for k, p in signature.parameters.items()} | settings
    found: dict[tuple[str, int | None], float] = {}
    for key, value in values.items():
        if isinstance(value, float):
            usual = VALUES.get(key, value)
            found[key, None] = value if key in settings and value and key != "d" else usual
        elif isinstance(value, tuple) and all(isinstance(x, float) for x in value):
            found.update({(key, i): x for i, x in enumerate(value)})
    return found


@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_hyper_parameters(case: str) -> None:
    name, settings = SMOOTH[case]
    hypers = hypers_of(case)
    assert ("lr", None) in hypers

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        changed: dict[str, Any] = dict(settings)
        parts: dict[str, list[Tensor]] = {}
        for (key, index), value in zip(hypers, values):
            if index is None:
                changed[key] = value
            else:
                parts.setdefault(key, []).append(value)
        changed |= {key: tuple(values) for key, values in parts.items()}
        optimizer = ROWS[name].functional(**changed)
        p = params()
        state = optimizer.init(p)
        for step in range(STEPS.get(case, 2)):
            updates, state = optimizer.update(gradients(step), state, params=p, inplace=False)
            p = torchopt.apply_updates(p, updates, inplace=False)
        return p["b"], p["w"]

    values = [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in hypers.values()]
    assert torch.autograd.gradcheck(function, values)
    if case != "shampoo":  # test_derivatives has its second derivatives; they take long
        assert torch.autograd.gradgradcheck(function, values, atol=1e-4)


@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_states(case: str) -> None:
    name, settings = SMOOTH[case]
    optimizer = ROWS[name].functional(**settings)
    p = params()
    state = optimizer.init(p)
    for step in range(1 if name == "rprop" else 2):  # it forgets a gradient that changed its sign
        updates, state = optimizer.update(gradients(step), state, params=p, inplace=False)
        p = torchopt.apply_updates(p, updates, inplace=False)
    leaves, spec = tree_flatten((p, gradients(2), state))
    where = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
    ]
    if name != "sgd" or "momentum" in settings:
        assert len(where) > 4, "no state"

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        changed = list(leaves)
        for i, value in zip(where, values):
            changed[i] = value
        params, grads, state = tree_unflatten(spec, changed)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        out, _ = tree_flatten((updates, state))
        return tuple(x for x in out if isinstance(x, Tensor) and x.requires_grad)

    values = [leaves[i].detach().clone().requires_grad_() for i in where]
    assert torch.autograd.gradcheck(function, values)
    if case != "shampoo":
        assert torch.autograd.gradgradcheck(function, values, atol=1e-4)
