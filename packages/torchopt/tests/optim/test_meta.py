# SPDX-License-Identifier: Apache-2.0
"""Meta-gradients through modules, and what the meta-optimizers do with special parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import ROWS, Row
from torch import Tensor, nn

import torchopt
from torchopt.errors import NotDifferentiableError


def net_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return net, torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_meta_gradient_equals_the_functional_one(name: str) -> None:
    row = ROWS[name]
    settings: dict[str, Any] = row.settings[-1]
    net, x, y = net_and_batch()
    start = dict(net.named_parameters())

    optimizer = row.meta(net, **settings)
    for _ in range(3):
        optimizer.step(((net(x) - y) ** 2).mean())
    got = torch.autograd.grad(((net(x) - y) ** 2).mean(), list(start.values()))

    functional = row.functional(**settings)
    params: dict[str, Tensor] = dict(start)
    state = functional.init(params)
    for _ in range(3):
        loss = ((torch.func.functional_call(net, params, (x,)) - y) ** 2).mean()
        grads = dict(
            zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=True))
        )
        updates, state = functional.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    outer = ((torch.func.functional_call(net, params, (x,)) - y) ** 2).mean()
    expected = torch.autograd.grad(outer, list(start.values()))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_maml_gradient_by_hand() -> None:
    # Inner loss c/2 (w - s)^2, one SGD step of size a, outer loss 1/2 (w' - q)^2:
    # w' = w - a c (w - s), d outer / d w = (w' - q) (1 - a c), d outer / d s = (w' - q) a c.
    w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    net = nn.Module()
    net.w = w
    s, q, a, c = torch.tensor(0.5, dtype=torch.float64, requires_grad=True), -1.0, 0.3, 1.7
    optimizer = torchopt.MetaSGD(net, lr=a)
    optimizer.step(c / 2 * (net.w - s) ** 2)
    stepped = 2.0 - a * c * 1.5
    assert net.w.item() == pytest.approx(stepped, abs=1e-15)
    (0.5 * (net.w - q) ** 2).backward()
    assert w.grad is not None
    assert s.grad is not None
    assert w.grad.item() == pytest.approx((stepped - q) * (1 - a * c), abs=1e-14)
    assert s.grad.item() == pytest.approx((stepped - q) * a * c, abs=1e-14)


def test_frozen_parameters_stay() -> None:
    net, x, y = net_and_batch()
    frozen = net[0].weight.requires_grad_(False)
    kept = frozen.clone()
    optimizer = torchopt.MetaAdam(net, lr=0.1)
    for _ in range(2):
        optimizer.step(((net(x) - y) ** 2).mean())
    assert net[0].weight is frozen
    assert torch.equal(frozen, kept)
    assert net[2].weight.grad_fn is not None


def test_tied_parameters_stay_tied_and_get_the_sum_of_gradients() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)
    ).double()
    net[2].weight = net[0].weight
    start = net[0].weight
    x = torch.randn(4, 3, dtype=torch.float64)
    loss = net(x).pow(2).sum()
    (g,) = torch.autograd.grad(loss, start, retain_graph=True)
    optimizer = torchopt.MetaSGD(net, lr=0.1)
    optimizer.step(loss)
    assert net[0].weight is net[2].weight
    torch.testing.assert_close(net[0].weight, start - 0.1 * g, rtol=1e-14, atol=1e-15)
    optimizer.step(net(x).pow(2).sum())
    assert net[0].weight is net[2].weight


def test_unused_parameters_keep_their_tensor() -> None:
    net, x, _ = net_and_batch()
    unused = nn.Linear(2, 2).double()
    both = nn.ModuleList([net, unused])
    optimizer = torchopt.MetaSGD(both, lr=0.1, momentum=0.9)
    weight = unused.weight
    optimizer.step(net(x).sum())
    assert unused.weight is weight
    optimizer.step(net(x).sum() + unused(x[:, :2]).sum())
    assert unused.weight is not weight


def test_outer_optimizer_keeps_the_original_parameters() -> None:
    net, x, y = net_and_batch()
    outer = torch.optim.SGD(net.parameters(), lr=0.1)
    originals = list(net.parameters())
    before = [p.detach().clone() for p in originals]
    start = torchopt.extract_state_dict(net, by="reference")
    inner = torchopt.MetaSGD(net, lr=0.1)
    inner.step(((net(x) - y) ** 2).mean())
    ((net(x) - y) ** 2).mean().backward()
    torchopt.recover_state_dict(net, start)
    outer.step()
    for p, old in zip(net.parameters(), before):
        assert not torch.equal(p, old)
    assert all(p is q for p, q in zip(net.parameters(), originals))


def test_second_module_is_a_separate_group() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(2, 2).double(), nn.Linear(2, 1).double()
    optimizer = torchopt.MetaAdam(first, lr=0.1)
    optimizer.add_param_group(second)
    x = torch.randn(3, 2, dtype=torch.float64)
    loss = second(first(x)).pow(2).sum()
    expected = [
        p - 0.1 * g / (g.abs() + 1e-8)
        for p, g in zip(
            second.parameters(),
            torch.autograd.grad(loss, list(second.parameters()), retain_graph=True),
        )
    ]
    optimizer.step(loss)
    torch.testing.assert_close(list(second.parameters()), expected, rtol=1e-10, atol=1e-12)
    assert len(optimizer.state_dict()) == 2


@pytest.mark.parametrize("row", ROWS.values(), ids=sorted(ROWS))
def test_bad_losses_are_refused_with_a_sentence(row: Row) -> None:
    net, x, _ = net_and_batch()
    optimizer = row.meta(net, lr=0.1)
    with pytest.raises(TypeError, match="expected a 0-dim tensor, got float"):
        optimizer.step(1.0)
    with pytest.raises(ValueError, match=r"expected a scalar loss, got a tensor of shape \(6, 1\)"):
        optimizer.step(net(x))
    with pytest.raises(NotDifferentiableError, match="has no graph"):
        optimizer.step(net(x).sum().detach())
    with pytest.raises(
        NotDifferentiableError, match=r"does not depend on any of the parameters \(0\.bias"
    ):
        optimizer.step(torch.ones(1, requires_grad=True).sum())
    for p in net.parameters():
        p.requires_grad_(False)
    with pytest.raises(
        NotDifferentiableError, match="none of the 4 parameters requires a gradient"
    ):
        optimizer.step(torch.ones(1, requires_grad=True).sum())


def test_constructor_refuses_what_is_not_a_transformation() -> None:
    net = nn.Linear(1, 1)
    for make in (torchopt.Optimizer, torchopt.MetaOptimizer):
        target = net.parameters() if make is torchopt.Optimizer else net
        with pytest.raises(TypeError, match="is not a GradientTransformation"):
            make(target, "sgd")
    with pytest.raises(TypeError, match="is not a GradientTransformation"):
        torchopt.FuncOptimizer(torch.optim.SGD)


@pytest.mark.parametrize("kind", ["tuple", "list", "dict", "tensor", "nested"])
@pytest.mark.parametrize("inplace", [False, True])
def test_func_optimizer_takes_every_tree(kind: str, inplace: bool) -> None:
    a = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    params: Any = {
        "tuple": (a, b),
        "list": [a, b],
        "dict": {"a": a, "b": b},
        "tensor": a,
        "nested": {"x": [a], "y": (b,)},
    }[kind]
    expected = torch.tensor([0.8, 1.6], dtype=torch.float64)
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(0.1))
    loss = (a**2).sum() + (b**2 if kind != "tensor" else 0.0)
    stepped = optimizer.step(loss, params, inplace=inplace)
    leaves = torchopt.pytree.tree_leaves(stepped)
    torch.testing.assert_close(leaves[0].detach(), expected, rtol=1e-14, atol=0)
    assert torchopt.pytree.tree_structure(stepped) == torchopt.pytree.tree_structure(params)
    assert (leaves[0] is a) == inplace
    if not inplace:
        torch.testing.assert_close(
            torch.autograd.grad(leaves[0].sum(), a)[0], torch.full_like(a, 0.8).detach()
        )


@pytest.mark.parametrize("before", [None, 10])
def test_a_shorter_horizon_applies_from_the_next_step(before: int | None) -> None:
    net = nn.Linear(2, 1).double()
    optimizer = torchopt.MetaSGD(net, lr=0.1, detach_every=before)
    x, graphs = torch.ones(1, 2, dtype=torch.float64), []
    for number in range(12):
        if number == 5:
            optimizer.detach_every = 3
        optimizer.step(net(x).square().sum())
        graphs.append(net.weight.grad_fn is not None)
    assert graphs == [True] * 5 + [False, True, True] * 2 + [False]
