# SPDX-License-Identifier: Apache-2.0
"""Gradients as seeds and numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchopt.diff.zero_order import Gaussian, ZeroOrder, seed_replay


def model() -> tuple[nn.Module, torch.Tensor]:
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    return net, torch.randn(7, 4, dtype=torch.float64)


@pytest.mark.parametrize("method", ["naive", "forward", "antithetic", "leave_one_out"])
def test_equals_the_engine_with_stored_noise(method: str) -> None:
    net, x = model()
    params = list(net.parameters())
    replayed = seed_replay.estimate(
        lambda: net(x).square().mean(), params, method=method, num_samples=5, sigma=0.1, seed=3
    )
    names = [name for name, _ in net.named_parameters()]

    def f(leaves: list[torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(net, dict(zip(names, leaves)), (x,)).square().mean()

    stored = ZeroOrder(Gaussian(), method, num_samples=5, sigma=0.1).estimate(f, params, seed=3)
    for got, expected in zip(replayed.materialize(params), stored.gradient):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    before = [p.detach().clone() for p in params]
    replayed.add_to_(params, -0.1)
    for p, b, g in zip(params, before, stored.gradient):
        torch.testing.assert_close(p.detach(), b - 0.1 * g)


def test_parameters_are_restored_bit_for_bit() -> None:
    net = nn.Linear(50, 50)
    with torch.no_grad():
        net.weight.mul_(torch.logspace(-20, 4, 50))
    before = [p.detach().clone() for p in net.parameters()]

    def bits_are_back() -> bool:
        return all(
            torch.equal(p.detach().view(torch.int32), b.view(torch.int32))
            for p, b in zip(net.parameters(), before)
        )

    moved = []

    def closure() -> torch.Tensor:
        moved.append(not bits_are_back())
        return net(torch.ones(50)).sum()

    seed_replay.estimate(closure, list(net.parameters()), num_samples=3, seed=0)
    assert moved == [True] * 6
    assert bits_are_back()

    def failing() -> torch.Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        seed_replay.estimate(failing, list(net.parameters()), seed=0)
    assert bits_are_back()


def test_a_tensor_given_twice_is_reported() -> None:
    p = torch.ones(2)
    with pytest.raises(ValueError, match="got one of them twice"):
        seed_replay.estimate(lambda: p.sum(), [p, p])


def test_tensors_that_share_memory_are_reported() -> None:
    whole = torch.ones(4, 4)
    for parts in ([whole, whole[1:]], [whole[:, :3], whole[:, 2:]], [whole[:2], whole.T]):
        with pytest.raises(ValueError, match="share no memory, but numbers 0 and 1"):
            seed_replay.estimate(lambda: whole.sum(), parts)
    seed_replay.estimate(lambda: whole.sum(), [whole[:2], whole[2:], torch.ones(0)])


def test_other_wrong_arguments_are_reported() -> None:
    p = torch.ones(2)
    with pytest.raises(ValueError, match="`sigma`"):
        seed_replay.estimate(lambda: p.sum(), [p], sigma=0.0)
    with pytest.raises(ValueError, match="`num_samples`"):
        seed_replay.estimate(lambda: p.sum(), [p], num_samples=0)
    with pytest.raises(TypeError, match=r"`closure`: expected a 0-dim tensor, got \[2\]"):
        seed_replay.estimate(lambda: 2 * p, [p])
    with pytest.raises(TypeError, match="got float"):
        seed_replay.estimate(lambda: 2.0, [p])
    assert torch.equal(p, torch.ones(2))
    with pytest.raises(ValueError, match=r"`losses`: expected shape \[N, 2\]"):
        seed_replay.combine(torch.ones(3, 1), [p], seed=0)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, None])
def test_every_bit_is_restored_whatever_happens(dtype: torch.dtype, error: type | None) -> None:
    # with values that arithmetic does not restore: NaN, infinities, -0, subnormal numbers
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 1.0, 1e4])
    p = special.to(dtype)
    strided = torch.randn(4, 6).to(dtype)[:, ::2]
    before = [bits(p), bits(strided.contiguous())]
    calls = []

    def closure() -> torch.Tensor:
        calls.append(p.clone())
        if error is not None and len(calls) == 2:
            raise error
        return strided.float().sum()

    if error is None:
        seed_replay.estimate(closure, [p, strided], num_samples=2, sigma=1.0, seed=1)
    else:
        with pytest.raises(error):
            seed_replay.estimate(closure, [p, strided], num_samples=2, sigma=1.0, seed=1)
    assert not torch.equal(calls[0][5], p[5])
    for x, b in zip((p, strided.contiguous()), before):
        assert torch.equal(bits(x), b)


def test_buffers_are_restored_and_masks_are_common() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
    net, x = net.double(), torch.randn(16, 4, dtype=torch.float64)
    buffers = {k: b.clone() for k, b in net.named_buffers()}
    params = list(net.parameters())

    def closure() -> torch.Tensor:
        return net(x).square().mean()

    state = torch.get_rng_state()
    result = seed_replay.estimate(
        closure, params, num_samples=4, sigma=1e-4, seed=3, scratch=list(net.buffers())
    )
    torch.testing.assert_close(dict(net.named_buffers()), buffers, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    # different masks would make differences of order 1 / sigma
    assert result.coefficients.abs().max() < 100
    again = seed_replay.estimate(
        closure, params, num_samples=4, sigma=1e-4, seed=3, scratch=list(net.buffers())
    )
    assert torch.equal(result.coefficients, again.coefficients)


def test_error_bars_are_those_of_the_engine() -> None:
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    replayed = seed_replay.estimate(
        lambda: x.square().sum(), [x], num_samples=50, sigma=0.1, seed=8, method="forward"
    ).with_error_bars([x])
    stored = ZeroOrder(Gaussian(), "forward", num_samples=50, sigma=0.1).estimate(
        lambda p: p[0].square().sum(), [x], seed=8
    )
    torch.testing.assert_close(replayed, stored)


@pytest.mark.parametrize("method", ["antithetic", "forward", "optimal_baseline"])
def test_workers_exchange_only_losses(method: str) -> None:
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def closure() -> torch.Tensor:
        return torch.sin(x).prod()

    whole = seed_replay.estimate(closure, [x], method=method, num_samples=6, sigma=0.1, seed=2)
    shares = [
        seed_replay.losses(closure, [x], seed=2, start=i, stop=j, method=method, sigma=0.1)
        for i, j in ((0, 1), (1, 6))
    ]
    center = closure() if method == "forward" else None
    together = seed_replay.combine(
        torch.cat(shares), [x], seed=2, method=method, sigma=0.1, center=center
    )
    assert torch.equal(together.coefficients, whole.coefficients)
    assert together.evaluations == whole.evaluations


def test_a_large_model_is_drawn_leaf_by_leaf() -> None:
    # more entries than are drawn at once: the noise is the engine's, and no leaf but one is held
    params = [torch.zeros(300, 200), torch.zeros(7), torch.zeros(80, 100)]
    leaves = list(Gaussian().leaves(params, 5, 3))
    for z, row in zip(leaves, Gaussian().draw(params, 5, 3, 4)):
        assert torch.equal(z, row[0])
    assert torch.cat([z.flatten() for z in leaves]).unique().numel() > 68_000 * 0.99
