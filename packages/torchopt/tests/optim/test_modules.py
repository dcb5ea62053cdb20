# SPDX-License-Identifier: Apache-2.0
"""Meta-gradients through modules of torch, against torch.func.functional_call and plain SGD."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import torchopt

DOUBLE = torch.float64
LR = 0.3
STEPS = 3


class Last(nn.Module):
    """The output of a recurrent or attention layer alone."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=True)[0]


class Tied(nn.Module):
    """An embedding that is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed((x.abs() * 3).long().clamp(max=6))))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: Last(nn.GRU(4, 3, num_layers=2, batch_first=True), lambda m, x: m(x)[0]),
    "LSTM": lambda: Last(nn.LSTM(4, 3, batch_first=True), lambda m, x: m(x)[0]),
    "RNN": lambda: Last(nn.RNN(4, 3, batch_first=True), lambda m, x: m(x)[0]),
    "MultiheadAttention": lambda: Last(nn.MultiheadAttention(4, 2, batch_first=True), attend),
    "BatchNorm": lambda: nn.Sequential(nn.Conv1d(5, 3, 1), nn.BatchNorm1d(3), nn.Tanh()),
    "GroupNorm": lambda: nn.Sequential(nn.Conv1d(5, 4, 2), nn.GroupNorm(2, 4), nn.GELU()),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.SiLU()),
    "Bilinear": lambda: Last(nn.Bilinear(4, 4, 2), lambda m, x: m(x, x.sin())),
    "weight_norm": lambda: nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Softplus()),
    "tied": Tied,
}


def task() -> Tensor:
    return torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)


def loss_of(out: Tensor) -> Tensor:
    return (out - 0.3).pow(2).mean() + out.sin().mean()


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]().double()


def written_out(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """Return what the kernel of weight_norm returns, whose second derivative is wrong."""
    return g * v / torch.norm_except_dim(v, 2, dim)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_meta_gradients(name: str) -> None:
    with mock.patch.object(torch, "_weight_norm", written_out):
        losses, wanted = unrolled_by_hand(name)
    net = make(name)
    originals = list(net.parameters())
    optimizer = torchopt.MetaSGD(net, lr=LR)
    for expected in losses:
        loss = loss_of(net(task()))
        assert loss.item() == pytest.approx(expected, rel=1e-10)
        optimizer.step(loss)
    got = torch.autograd.grad(loss_of(net(task())), originals)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
    assert max(g.abs().max() for g in wanted) > 1e-4
    assert losses[-1] < losses[0]


def unrolled_by_hand(name: str) -> tuple[list[float], Sequence[Tensor]]:
    x = task()
    twin = make(name)
    start = dict(twin.named_parameters())
    params: dict[str, Tensor] = dict(start)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(torch.func.functional_call(twin, params, (x,)))
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {k: p - LR * g for (k, p), g in zip(params.items(), grads)}
        losses.append(loss.item())
    outer = loss_of(torch.func.functional_call(twin, params, (x,)))
    return losses, torch.autograd.grad(outer, list(start.values()))


@pytest.mark.parametrize("name", ["GRU", "MultiheadAttention", "LayerNorm"])
def test_meta_gradients_under_autocast(name: str) -> None:
    def meta_gradients(autocast: bool) -> list[Tensor]:
        net = make(name).float()
        x = task().float()
        originals = list(net.parameters())
        optimizer = torchopt.MetaAdam(net, lr=0.05, eps=1e-2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for _ in range(2):
                optimizer.step(loss_of(net(x).float()))
            outer = loss_of(net(x).float())
        assert all(p.dtype is torch.float32 for p in net.parameters())
        return list(torch.autograd.grad(outer, originals))

    low, high = (torch.cat([g.reshape(-1) for g in meta_gradients(a)]) for a in (True, False))
    # bfloat16 has 8 bits; second derivatives lose two or three more, and five where a layer divides
    # by the spread of three numbers.
    bits = {"GRU": 6, "MultiheadAttention": 5, "LayerNorm": 3}[name]
    assert (low - high).norm() < 2**-bits * high.norm()
    assert not torch.equal(low, high)


def test_an_inner_loop_under_autocast_inside_a_scaled_outer_loop() -> None:
    net = make("LayerNorm").float()
    outer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    start = torchopt.extract_state_dict(net, by="reference")
    before = [p.detach().clone() for p in net.parameters()]
    inner = torchopt.MetaSGD(net, lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inner.step(loss_of(net(task().float()).float()))
        loss = loss_of(net(task().float()).float())
    scaler.scale(loss).backward()
    torchopt.recover_state_dict(net, start)
    scaler.step(outer)
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before))
