# SPDX-License-Identifier: Apache-2.0
"""Optimizers that look at the shape of a parameter, and parameters of complex numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import Tensor

import torchopt
from torchopt import alias
from torchopt.transform import averaged_params, orthogonalize

DOUBLE = torch.float64


def loss_of(params: list[Tensor]) -> Tensor:
    return sum(((p - 0.3) ** 4).sum() + (p.sin() ** 2).sum() for p in params)  # type: ignore[return-value]


def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(s, generator=generator, dtype=DOUBLE).requires_grad_() for s in shapes]


def stepped(optimizer: Any, params: list[Tensor], steps: int = 10) -> list[Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": 0.5, "weight_decay": 0.1},
        {"lr": 0.1, "beta2_decay": -0.5, "eps": (1e-5, 0.1), "d": 2.0, "maximize": True},
    ],
)
def test_adafactor_equals_torch(settings: dict[str, Any]) -> None:
    shapes = ((4, 3), (5,), (), (2, 3, 4))
    ours, theirs = parameters(*shapes), parameters(*shapes)
    got = stepped(torchopt.Optimizer(ours, alias.adafactor(**settings)), ours)
    expected = stepped(torch.optim.Adafactor(theirs, foreach=False, **settings), theirs)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_adafactor_state_is_sublinear() -> None:
    state = alias.adafactor().init([torch.zeros(30, 20)])
    sizes = [x.numel() for x in torchopt.pytree.tree_leaves(state) if x.dtype == torch.float32]
    assert sorted(sizes) == [20, 30]


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_orthogonalization_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    (g,) = parameters(shape)
    u, s, v = torch.linalg.svd(g.detach(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s) @ v * max(1.0, shape[0] / shape[1]) ** 0.5
    got, _ = orthogonalize().update(g.detach(), ())
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: orthogonalize(steps=2).update(x, ())[0], g)
    with pytest.raises(ValueError, match="expected matrices, got shape"):
        orthogonalize().update(torch.ones(3), ())


def test_muon_steps_other_parameters_with_adamw() -> None:
    ours, theirs = parameters((4,), (2, 2, 2)), parameters((4,), (2, 2, 2))
    settings = {"lr": 0.01, "weight_decay": 0.1}
    got = stepped(torchopt.Optimizer(ours, alias.muon(**settings)), ours)
    expected = stepped(torch.optim.AdamW(theirs, **settings), theirs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_schedule_free_averages_can_be_taken_out() -> None:
    p = {"w": torch.tensor([1.0, -1.0], dtype=DOUBLE)}
    optimizer = alias.schedule_free_sgd(0.1, beta=0.9)
    state = optimizer.init(p)
    for _ in range(3):
        updates, state = optimizer.update({"w": torch.ones(2, dtype=DOUBLE)}, state, params=p)
        p = torchopt.apply_updates(p, updates, inplace=False)
    # z = 1 - 0.1 k, and x is their mean: 1 - 0.1 (1 + 2 + 3) / 3.
    expected = torch.tensor([0.8, -1.2], dtype=DOUBLE)
    torch.testing.assert_close(averaged_params(state, p)["w"], expected)
    with pytest.raises(
        ValueError, match="expected the state of a schedule-free optimizer, got ScaleByAdam"
    ):
        averaged_params(torchopt.adam().init(p), p)


COMPLEX = {
    "sgd": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD),
    "adam": ({"lr": 0.05, "weight_decay": 0.1}, torch.optim.Adam),
    "adamw": ({"lr": 0.05}, torch.optim.AdamW),
    "adamax": ({"lr": 0.05, "eps": 1e-8}, torch.optim.Adamax),
    "adagrad": ({"lr": 0.05}, torch.optim.Adagrad),
    "adadelta": ({"lr": 1.0}, torch.optim.Adadelta),
    "rmsprop": ({"lr": 0.05, "centered": True, "momentum": 0.9}, torch.optim.RMSprop),
    "radam": ({"lr": 0.05, "eps": 1e-8}, torch.optim.RAdam),
    "rprop": ({"lr": 0.05}, torch.optim.Rprop),
}


@pytest.mark.parametrize("name", sorted(COMPLEX))
def test_complex_parameters_are_pairs_of_real_ones_as_in_torch(name: str) -> None:
    settings, twin = COMPLEX[name]

    def run(make: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        w = torch.randn(4, generator=generator, dtype=torch.complex128).requires_grad_()
        target = torch.tensor(0.3 - 0.7j, dtype=torch.complex128)
        optimizer = make([w])
        for _ in range(10):
            optimizer.zero_grad()
            (w - target).abs().pow(3).sum().backward()
            optimizer.step()
        return w.detach()

    got = run(lambda params: ROWS[name].classic(params, **settings))
    expected = run(lambda params: twin(params, foreach=False, **settings))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


STARTS = {
    "adagrad": "initial_accumulator_value",
    "rmsprop": "initial_scale",
    "rprop": "lr",
    "yogi": "initial_accumulator",
}


@pytest.mark.parametrize("name", sorted(STARTS))
def test_both_parts_of_a_complex_number_start_alike(name: str) -> None:
    """The initial value of a state is that of the imaginary part too, and so is its derivative."""
    found = []
    for as_pairs in (False, True):
        h = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
        optimizer = getattr(torchopt, name)(**{"lr": 0.05, STARTS[name]: h})
        z = torch.tensor([0.5 - 0.2j, 1.5 + 0.7j], dtype=torch.complex128)
        p = torch.view_as_real(z).clone() if as_pairs else z
        state = optimizer.init(p)
        for _ in range(3):
            u, state = optimizer.update(p * 2, state, params=p, inplace=False)
            p = p + u
        p = p if as_pairs else torch.view_as_real(p)
        found.append((p, *torch.autograd.grad(p.square().sum(), h)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    assert found[0][1] != 0
