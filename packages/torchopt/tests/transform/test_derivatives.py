# SPDX-License-Identifier: Apache-2.0
"""Every rule is differentiable twice with respect to gradients, parameters and hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import ROWS, SMOOTH
from torch import Tensor

import torchopt

DOUBLE = torch.float64


def unrolled(name: str, settings: dict[str, Any], steps: int) -> Callable[..., Tensor]:
    """Return (w, b, g1, g2, ...) -> parameters after `steps` steps with those gradients of w."""
    optimizer = ROWS[name].functional(**settings)

    def function(w: Tensor, b: Tensor, *gs: Tensor) -> tuple[Tensor, Tensor]:
        params = {"w": w, "b": b}
        state = optimizer.init(params)
        for g in gs[:steps]:
            grads = {"w": g, "b": (g[:2] * b).sin()}
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return params["w"], params["b"]

    return function


def inputs(steps: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)

    def randn(n: int) -> Tensor:
        return torch.randn(n, generator=generator, dtype=DOUBLE).requires_grad_()

    # Away from the kinks of max(b2 nu, |g|) and from the rule at zero, which has its own test.
    return (randn(3), randn(2), *(randn(3) for _ in range(steps)))


@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_gradcheck(case: str) -> None:
    # RAdam changes its formula at the sixth step; Shampoo's roots take a while.
    steps = {"radam": 7, "schedule_free_radam": 6, "shampoo": 2}.get(case, 3)
    function = unrolled(*SMOOTH[case], steps)
    assert torch.autograd.gradcheck(function, inputs(steps), check_forward_ad=True)


@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_gradgradcheck(case: str) -> None:
    steps = {"radam": 7, "schedule_free_radam": 6}.get(case, 2)
    function = unrolled(*SMOOTH[case], steps)
    assert torch.autograd.gradgradcheck(function, inputs(steps))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("scale_by_adam", ("b1", "b2", "eps", "eps_root")),
        ("scale_by_rms", ("alpha", "eps")),
        ("scale_by_stddev", ("alpha", "eps")),
        ("scale_by_adadelta", ("rho", "eps")),
        ("scale_by_adamax", ("b1", "b2", "eps")),
        ("trace", ("momentum",)),
        ("scale", ("step_size",)),
    ],
)
def test_hyper_parameters_are_differentiable(name: str, names: tuple[str, ...]) -> None:
    generator = torch.Generator().manual_seed(4)
    grads = [torch.randn(3, generator=generator, dtype=DOUBLE) for _ in range(3)]

    def function(*values: Tensor) -> Tensor:
        transformation = getattr(torchopt.transform, name)(**dict(zip(names, values)))
        state = transformation.init(grads[0])
        for g in grads:
            updates, state = transformation.update(g, state, inplace=False)
        return updates

    start = {"b1": 0.8, "b2": 0.9, "eps": 0.01, "eps_root": 0.02, "alpha": 0.8, "rho": 0.7}
    start |= {"momentum": 0.6, "step_size": 0.3}
    values = tuple(torch.tensor(start[n], dtype=DOUBLE, requires_grad=True) for n in names)
    assert torch.autograd.gradcheck(function, values)
    assert torch.autograd.gradgradcheck(function, values)


@pytest.mark.parametrize(
    ("name", "fused"), [*((name, False) for name in sorted(ROWS)), ("adam", True), ("adamw", True)]
)
def test_zero_gradients_have_finite_meta_gradients(name: str, fused: bool) -> None:
    settings = {"use_accelerated_op": True} if fused else {}
    optimizer = ROWS[name].functional(lr=0.1, **settings)
    g = torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE, requires_grad=True)
    params = torch.ones(3, dtype=DOUBLE)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(g, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    (meta_grad,) = torch.autograd.grad(params.sum(), g, create_graph=True)
    assert torch.isfinite(meta_grad).all()
    if name in ("adam", "adamw", "rmsprop", "adagrad"):
        assert meta_grad[0].item() == 0.0
    if meta_grad.requires_grad:  # not where the updates are linear in the gradients
        (second,) = torch.autograd.grad(meta_grad.sum(), g)
        assert torch.isfinite(second).all()


def test_zero_gradients_have_the_true_slope_with_eps_root() -> None:
    for fused in (False, True):
        optimizer = torchopt.adam(1.0, eps=0.0, eps_root=1e-4, use_accelerated_op=fused)
        g = torch.zeros(1, dtype=DOUBLE, requires_grad=True)
        updates, _ = optimizer.update(g, optimizer.init(g.detach()), inplace=False)
        # u = g / sqrt(g^2 + eps_root), so du/dg = 1 / sqrt(eps_root) at 0.
        assert torch.autograd.grad(updates.sum(), g)[0].item() == pytest.approx(-100.0, rel=1e-12)


@pytest.mark.parametrize("case", sorted(SMOOTH))
def test_vmap_jvp_and_jacrev_through_an_inner_loop(case: str) -> None:
    function = unrolled(*SMOOTH[case], 2)
    w, b, *gs = (x.detach() for x in inputs(2))
    batch = torch.stack([w, 2 * w, -w])
    got = torch.func.vmap(lambda x: function(x, b, *gs)[0] + function(w, b, x, *gs[1:])[0])(batch)
    expected = torch.stack([function(x, b, *gs)[0] + function(w, b, x, *gs[1:])[0] for x in batch])
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)

    def of_first(g: Tensor) -> Tensor:
        return function(w, b, g, *gs[1:])[0]

    jacobian = torch.func.jacrev(of_first)(gs[0])
    tangent = torch.tensor([0.3, -1.0, 2.0], dtype=DOUBLE)
    _, push = torch.func.jvp(of_first, (gs[0],), (tangent,))
    torch.testing.assert_close(push, jacobian @ tangent, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.func.jacfwd(of_first)(gs[0]), jacobian, rtol=1e-12, atol=1e-13)
    batched = torch.func.vmap(torch.func.grad(lambda g: (of_first(g) ** 2).sum()))(batch)
    looped = torch.stack([torch.func.grad(lambda g: (of_first(g) ** 2).sum())(g) for g in batch])
    torch.testing.assert_close(batched, looped, rtol=1e-12, atol=1e-13)
