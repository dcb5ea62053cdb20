# SPDX-License-Identifier: Apache-2.0
"""Every step is differentiable, twice, with respect to its state and its hyper-parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import ROWS, SMOOTH, hypers_of, with_hypers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import torchopt
from torchopt.pytree import tree_flatten, tree_unflatten

DOUBLE = torch.float64

STEPS = {"radam": 7, "schedule_free_radam": 6}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def params() -> dict[str, Tensor]:
    return {"b": randn(3, seed=1), "w": randn(3, 2, seed=2)}


def gradients(step: int) -> dict[str, Tensor]:
    return {"b": randn(3, seed=10 + step), "w": randn(3, 2, seed=20 + step)}


@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_hyper_parameters(case: str) -> None:
    name, _ = SMOOTH[case]
    hypers = hypers_of(case)
    assert ("lr", None) in hypers

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        optimizer = ROWS[name].functional(**with_hypers(case, values))
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


class Copies(TorchDispatchMode):
    """Records the operations that take a tensor from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        if isinstance(out, Tensor) and not out.is_cpu and any(x.is_cpu for x in tensors):
            self.found.append(str(func))
        return out


def without_copies(make: Any) -> Any:
    """Return a function like `torch.tensor` that refuses to place a number on a device."""

    def made(x: Any, *rest: Any, **options: Any) -> Tensor:
        assert isinstance(x, Tensor) or options.get("device") is None
        return make(x, *rest, **options)

    return made


@pytest.mark.parametrize("name", sorted(ROWS))
def test_numbers_are_not_copied_to_the_device_in_each_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy from the host would wait for the device."""
    optimizer = ROWS[name].functional(**ROWS[name].settings[-1])
    p = {key: x.to("meta") for key, x in params().items()}
    grads = {key: x.to("meta") for key, x in gradients(0).items()}
    _, state = optimizer.update(grads, optimizer.init(p), params=p, inplace=False)
    for maker in ("as_tensor", "tensor"):  # modes do not see the copies that these make
        monkeypatch.setattr(torch, maker, without_copies(getattr(torch, maker)))
    with Copies() as copies:
        optimizer.update(grads, state, params=p, inplace=False)
    assert copies.found == []
