# SPDX-License-Identifier: Apache-2.0
"""A sparse gradient counts as the dense tensor that it stands for, for every optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import Tensor, nn

import torchopt
from torchopt import transform

INDICES = torch.tensor([0, 2, 2])  # row 2 occurs twice: the gradient is not coalesced


def table(sparse: bool) -> nn.Embedding:
    generator = torch.Generator().manual_seed(0)
    net = nn.Embedding(5, 3, sparse=sparse, dtype=torch.float64)
    with torch.no_grad():
        net.weight.copy_(torch.randn(5, 3, generator=generator, dtype=torch.float64))
    return net


def classic(name: str, sparse: bool) -> Tensor:
    net = table(sparse)
    optimizer = ROWS[name].classic(net.parameters(), **ROWS[name].settings[-1])
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        (net(INDICES) ** 3).sum().backward()
        optimizer.step()
    return net.weight.detach()


def functional(name: str, sparse: bool, inplace: bool) -> Tensor:
    optimizer = ROWS[name].functional(**ROWS[name].settings[-1])
    weight = table(sparse).weight.detach()
    state = optimizer.init(weight)
    for _ in range(3):
        w = weight.clone().requires_grad_()
        loss = (nn.functional.embedding(INDICES, w, sparse=sparse) ** 3).sum()
        (grad,) = torch.autograd.grad(loss, w)
        updates, state = optimizer.update(grad, state, params=weight, inplace=inplace)
        weight = torchopt.apply_updates(weight, updates, inplace=inplace)
    return weight


def meta_gradient(name: str, sparse: bool) -> Tensor:
    net = table(sparse)
    start = net.weight
    optimizer = ROWS[name].meta(net, **ROWS[name].settings[-1])
    for _ in range(2):
        optimizer.step((net(INDICES) ** 3).sum())
    (grad,) = torch.autograd.grad((net(INDICES) ** 2).sum(), start)
    return grad.to_dense() if grad.is_sparse else grad


@pytest.mark.parametrize("name", sorted(ROWS))
def test_steps_are_those_of_dense_gradients(name: str) -> None:
    torch.testing.assert_close(classic(name, True), classic(name, False), rtol=1e-12, atol=1e-12)
    for inplace in (True, False):
        want = functional(name, False, inplace)
        assert not torch.equal(want, table(False).weight)
        torch.testing.assert_close(functional(name, True, inplace), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_meta_gradients_are_those_of_dense_gradients(name: str) -> None:
    want = meta_gradient(name, False)
    assert want.abs().max() > 0
    torch.testing.assert_close(meta_gradient(name, True), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "lr", [0.1, torch.tensor(0.1), torchopt.schedule.linear_schedule(0.1, 0.0, 9)], ids=repr
)
def test_plain_sgd_keeps_them_sparse(lr: Any) -> None:
    weight = table(True).weight
    (nn.functional.embedding(INDICES, weight, sparse=True) ** 3).sum().backward()
    grad = weight.grad
    assert grad is not None
    assert grad.is_sparse
    optimizer = torchopt.sgd(lr)
    updates, _ = optimizer.update(grad, optimizer.init(weight), inplace=False)
    assert updates.is_sparse
    torch.testing.assert_close(updates.to_dense(), -0.1 * grad.to_dense(), rtol=1e-7, atol=0)


WRAPPERS: dict[str, Any] = {
    "accumulate": lambda t: transform.accumulate(t, 2),
    "apply_if_finite": transform.apply_if_finite,
    "cautious": transform.cautious,
    "compensated": transform.compensated,
    "galore": lambda t: transform.galore(t, rank=1),
    "in_8_bits": lambda t: transform.in_8_bits(t, min_size=1),
    "in_precision": lambda t: transform.in_precision(t, torch.float64),
    "lookahead": lambda t: transform.lookahead(t, 2),
    "masked": lambda t: transform.masked(t, True),
    "sam": transform.sam,
}


@pytest.mark.parametrize("inner", [torchopt.sgd, torchopt.adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_step_as_with_dense_gradients(name: str, inner: Any) -> None:
    """SGD alone returns sparse updates, Adam dense ones."""
    found = []
    for sparse in (True, False):
        optimizer = WRAPPERS[name](inner(0.1))
        weight = table(sparse).weight.detach()
        state = optimizer.init(weight)
        for _ in range(4):
            w = weight.clone().requires_grad_()
            loss = (nn.functional.embedding(INDICES, w, sparse=sparse) ** 3).sum()
            (grad,) = torch.autograd.grad(loss, w)
            updates, state = optimizer.update(grad, state, params=weight, inplace=False)
            if updates is not None:
                weight = torchopt.apply_updates(weight, updates, inplace=False)
        found.append(weight)
    assert not torch.equal(found[1], table(False).weight)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# torch.optim.Adagrad makes sparse tensors without saying whether to check them.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("twin", [torch.optim.SGD, torch.optim.Adagrad])
def test_torch_takes_the_same_steps(twin: Any) -> None:
    ours = torchopt.SGD if twin is torch.optim.SGD else torchopt.Adagrad
    weights = []
    for make in (ours, twin):
        net = table(True)
        optimizer = make(net.parameters(), lr=0.1)
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            (net(INDICES) ** 3).sum().backward()
            optimizer.step()
        weights.append(net.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)
