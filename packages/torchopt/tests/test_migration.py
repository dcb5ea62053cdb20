# SPDX-License-Identifier: Apache-2.0
"""The promises of the migration guide about behaviour, row by row."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt import linear_solve
from torchopt.diff.implicit import custom_fixed_point, custom_root
from torchopt.errors import (
    KernelUnavailableError,
    LeafTypeError,
    MismatchError,
    NotDifferentiableError,
)

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "migration.md"
RATE, STEPS = 0.1, 3


def problem() -> tuple[nn.Module, Callable[[nn.Module], Tensor], Tensor, Tensor]:
    """Return a linear model without bias, its loss, and H and b with gradient H w - b."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (3, 1))
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.randn(1, 3, generator=generator, dtype=torch.float64))
    return net, lambda m: ((m(x) - y) ** 2).mean(), 2 * x.mT @ x / 8, 2 * x.mT @ y / 8


def exact_meta_gradient(weight: Tensor, h: Tensor, b: Tensor, steps: int = STEPS) -> Tensor:
    """Return (I - RATE H)^steps (H w - b), the meta-gradient for the weights at the start."""
    shrink = torch.linalg.matrix_power(torch.eye(3, dtype=h.dtype) - RATE * h, steps)
    solution = torch.linalg.solve(h, b)
    last = solution + shrink @ (weight.detach().mT - solution)
    return (shrink @ (h @ last - b)).mT


def stepped(net: nn.Module, loss: Callable[[nn.Module], Tensor], **options: Any) -> Tensor:
    inner = torchopt.MetaOptimizer(net, torchopt.sgd(RATE), **options)
    for _ in range(STEPS):
        inner.step(loss(net))
    return loss(net)


def test_a_snapshot_by_reference_leaves_the_outer_optimizer_its_tensors() -> None:
    net, loss, h, b = problem()
    outer = torchopt.Adam(net.parameters(), lr=0.01)
    held, wanted = net.weight, exact_meta_gradient(net.weight, h, b)
    start = torchopt.extract_state_dict(net, by="reference")
    meta_loss = stepped(net, loss)
    torchopt.recover_state_dict(net, start)
    meta_loss.backward()
    assert net.weight is held
    torch.testing.assert_close(held.grad, wanted)
    before = net.weight.detach().clone()
    outer.step()
    assert not torch.equal(net.weight, before)


def test_steps_of_a_copy_leave_the_module_alone() -> None:
    net, loss, h, b = problem()
    before = net.weight.detach().clone()
    fast = copy.deepcopy(net)
    start = list(fast.parameters())
    meta_loss = stepped(fast, loss)
    (found,) = torch.autograd.grad(meta_loss, start)
    torch.testing.assert_close(found, exact_meta_gradient(net.weight, h, b))
    assert torch.equal(net.weight, before)
    assert net.weight.grad is None


def test_a_step_without_a_graph_cuts_the_meta_gradient() -> None:
    net, loss, h, b = problem()
    held = net.weight
    inner = torchopt.MetaSGD(net, lr=RATE)
    value = loss(net)
    with torch.no_grad():
        inner.step(value)
    cut = net.weight
    inner.step(loss(net))
    meta_loss = loss(net)
    wanted = exact_meta_gradient(cut, h, b, steps=1)
    torch.testing.assert_close(torch.autograd.grad(meta_loss, cut, retain_graph=True)[0], wanted)
    assert torch.autograd.grad(meta_loss, held, allow_unused=True) == (None,)


def test_first_order_is_the_gradient_at_the_last_parameters() -> None:
    net, loss, h, b = problem()
    held = net.weight
    meta_loss = stepped(net, loss, first_order=True)
    (found,) = torch.autograd.grad(meta_loss, held)
    torch.testing.assert_close(found, (h @ net.weight.detach().mT - b).mT)


def test_statistics_of_batch_norm_come_back() -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    start = torchopt.extract_state_dict(net, by="reference", with_buffers=True, detach_buffers=True)
    stepped(net, lambda m: m(x).square().mean())
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    torchopt.recover_state_dict(net, start)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


def root_gradient(solve: Any) -> tuple[Tensor, list[Any]]:
    matrix = torch.diag(torch.arange(1.0, 7.0, dtype=torch.float64))
    fit = custom_root(lambda w, p: matrix @ w - p, argnums=1, solve=solve)(
        lambda w, p: torch.linalg.solve(matrix, p)
    )
    p = torch.ones(6, dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(torch.zeros(6, dtype=torch.float64), p).sum().backward()
    return p.grad, caught


def test_truncated_conjugate_gradients_warn_unless_intended() -> None:
    exact = 1 / torch.arange(1.0, 7.0, dtype=torch.float64)
    noisy, warned = root_gradient(linear_solve.CG(maxiter=3))
    quiet, silent = root_gradient(linear_solve.CG(maxiter=3, on_fail="ignore"))
    assert "maxiter" in str(warned[0].message)
    assert silent == []
    assert torch.equal(noisy, quiet)
    assert 0.01 < (quiet - exact).abs().max() < 0.2
    converged, silent = root_gradient(linear_solve.CG())
    torch.testing.assert_close(converged, exact, rtol=1e-5, atol=1e-8)
    assert silent == []


def test_unrolled_and_windowed_inner_loops() -> None:
    net, _, h, b = problem()

    def quadratic(w: Tensor, _: Any) -> Tensor:
        return (0.5 * w.mT @ h @ w - b.mT @ w).sum()

    w = net.weight.detach().mT.clone().requires_grad_()
    rate = torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    for window in (None, 1):
        inner = torchopt.inner_loop(quadratic, torchopt.sgd, steps=STEPS, window=window)
        last = inner(w, None, lr=rate).params
        grads = torch.autograd.grad(quadratic(last, None), [w, rate], allow_unused=True)
        if window is None:
            torch.testing.assert_close(grads[0].mT, exact_meta_gradient(net.weight, h, b))
        else:
            before = torchopt.inner_loop(quadratic, torchopt.sgd, steps=STEPS - 1)
            w2 = before(w.detach(), None, lr=rate.detach()).params
            w3 = w2 - RATE * (h @ w2 - b)
            wanted = -((h @ w3 - b) * (h @ w2 - b)).sum()
            torch.testing.assert_close(grads[1], wanted.detach())


def test_a_fixed_point_is_differentiated_by_its_equation() -> None:
    solve = custom_fixed_point(lambda w, p: 0.5 * w + p, argnums=1)(lambda w, p: 2 * p)
    p = torch.tensor(3.0, requires_grad=True)
    solve(torch.zeros(()), p).backward()
    torch.testing.assert_close(p.grad, torch.tensor(2.0))


def test_a_rate_that_is_a_tensor_replaces_an_override() -> None:
    net, loss, h, b = problem()
    rate = torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    before = net.weight.detach().mT.clone()
    inner = torchopt.MetaOptimizer(net, torchopt.sgd(lr=rate))
    inner.step(loss(net))
    (found,) = torch.autograd.grad(loss(net), rate)
    slope = h @ before - b
    torch.testing.assert_close(found, -(slope * (h @ (before - RATE * slope) - b)).sum())


def test_a_transformation_before_the_optimizer_replaces_a_gradient_callback() -> None:
    net, loss, _, _ = problem()
    doubled, halved = (copy.deepcopy(net) for _ in range(2))
    chain = torchopt.chain(torchopt.transform.scale(2.0), torchopt.sgd(RATE))
    torchopt.MetaOptimizer(doubled, chain).step(loss(doubled))
    torchopt.MetaSGD(halved, lr=2 * RATE).step(loss(halved))
    torch.testing.assert_close(doubled.weight, halved.weight)
    assert not torch.equal(doubled.weight, net.weight)


@pytest.mark.parametrize("kind", ["unused", "frozen"])
def test_unused_and_frozen_parameters_do_not_change(kind: str) -> None:
    net, loss, _, _ = problem()
    net.register_parameter("extra", nn.Parameter(torch.ones(2), requires_grad=kind == "unused"))
    extra, weight = net.extra, net.weight
    torchopt.MetaSGD(net, lr=RATE).step(loss(net))
    assert torch.equal(net.extra, extra)
    assert net.extra.requires_grad == (kind == "unused")
    assert not torch.equal(net.weight, weight)


def test_updates_that_are_applied_out_of_place_leave_the_module_alone() -> None:
    net, _, _, _ = problem()
    params = dict(net.named_parameters())
    updates = {"weight": torch.ones_like(net.weight)}
    stepped = torchopt.apply_updates(params, updates, inplace=False)
    torch.testing.assert_close(stepped["weight"], net.weight + 1)
    (slope,) = torch.autograd.grad(stepped["weight"].sum(), net.weight)
    assert torch.equal(slope, torch.ones_like(slope))


def test_a_neumann_series_is_an_implicit_gradient() -> None:
    slope, warned = root_gradient(linear_solve.Neumann(alpha=0.3, maxiter=400))
    torch.testing.assert_close(slope, 1 / torch.arange(1.0, 7.0, dtype=torch.float64))
    assert warned == []


@pytest.mark.parametrize(
    "relied", ["broadcast", "stale graph", "three fields", "names of tensors", "fallback"]
)
def test_behaviour_of_0_7_that_programs_may_have_relied_on(relied: str) -> None:
    adam, p = torchopt.adam(0.1), torch.ones(3)
    if relied == "broadcast":
        with pytest.raises(MismatchError, match="shape"):
            adam.update(torch.ones(1), adam.init(p), params=p)
    elif relied == "stale graph":
        w = torch.ones(2)
        x = torch.ones(2, requires_grad=True)
        value = (w * x).sum()
        torchopt.apply_updates(w, torch.ones(2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
    elif relied == "three fields":
        optimizer = torchopt.adamax(0.1)
        state = optimizer.init(p)
        assert len(state[0]) == 4
        older = (type(state[0])(*state[0][:3]), *state[1:])
        torch.testing.assert_close(
            optimizer.update(p, older, inplace=False)[0],
            optimizer.update(p, state, inplace=False)[0],
        )
    elif relied == "names of tensors":
        x = torch.ones(2, requires_grad=True)
        with pytest.raises(TypeError, match="name"):
            torchopt.visual.make_graph(x.sum(), params={x: "x"})
    else:
        native, p = torchopt.adam(0.1, use_accelerated_op=True), p.to(torch.complex64)
        state = native.init(p)
        with pytest.raises(KernelUnavailableError, match="use_accelerated_op=False"):
            native.update(p, state)


@pytest.mark.parametrize("refused", ["no parameters", "no dependence", "integers",
                                     "a negative norm", "updates for no parameters"])  # fmt: skip
def test_what_is_stricter_than_0_7(refused: str) -> None:
    net, adam = problem()[0], torchopt.adam(0.1)
    if refused == "no parameters":
        for make in (lambda: torchopt.Adam([], lr=0.1), lambda: torchopt.MetaSGD(nn.ReLU(), 0.1)):
            with pytest.raises(ValueError, match="expected"):
                make()
    elif refused == "no dependence":
        with pytest.raises(NotDifferentiableError, match="does not depend"):
            torchopt.MetaSGD(net, lr=0.1).step(torch.ones((), requires_grad=True))
    elif refused == "a negative norm":
        with pytest.raises(ValueError, match=">= 0"):
            torchopt.clip_grad_norm(-1.0)
    elif refused == "updates for no parameters":
        with pytest.raises(LeafTypeError, match="got None"):
            torchopt.apply_updates(None, torch.ones(2))
    else:
        with pytest.raises(MismatchError, match="expected a floating-point"):
            adam.update(torch.ones(2, dtype=torch.int32), adam.init(torch.ones(2)))


def test_names_that_the_guide_maps_to_exist() -> None:
    if not GUIDE.is_file():
        pytest.skip("the manual is not beside these tests")
    cells = re.findall(r"^\| .* \| (.*) \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    names = {name for cell in cells for name in re.findall(r"torchopt((?:\.\w+)+)\b", cell)}
    assert len(names) > 20
    for name in sorted(names):
        found: Any = torchopt
        for part in name.split(".")[1:]:
            found = getattr(found, part)
