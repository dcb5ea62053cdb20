# SPDX-License-Identifier: Apache-2.0
"""Other threads do not see what an inner loop replaces during a call."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt.diff import twice_differentiable
from torchopt.diff.explicit import reached
from torchopt.diff.explicit.blocks import rematerialised
from torchopt.diff.explicit.fingerprint import fingerprint
from torchopt.diff.surroundings import Surroundings
from torchopt.diff.twice_differentiable import TwiceDifferentiable, attention
from torchopt.torch_internals import without_recurrent_kernels


def test_multi_head_attention_leaves_the_function_of_torch_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, ours = torch.nn.functional.scaled_dot_product_attention, attention
    seen = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.nn.functional.scaled_dot_product_attention is original)
        return ours(*args, **kwargs)

    monkeypatch.setattr(twice_differentiable, "attention", watched)
    layer = nn.MultiheadAttention(4, 2).double()
    x = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, _ = layer(x, x, x, need_weights=False)
    with TwiceDifferentiable():
        found, _ = layer(x, x, x, need_weights=False)
    assert seen == [True]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_kernels_of_recurrent_layers_come_back_whoever_leaves_first() -> None:
    before = torch._C._get_mkldnn_enabled()
    first, second = without_recurrent_kernels(), without_recurrent_kernels()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    inside = torch._C._get_mkldnn_enabled()
    second.__exit__(None, None, None)
    assert not inside
    assert torch._C._get_mkldnn_enabled() is before


@pytest.mark.parametrize("replayed_first", [True, False])
def test_blocks_and_replays_may_overlap(replayed_first: bool) -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    order = [Surroundings(lambda: block).retaken().replayed(), rematerialised([block])]
    for context in order if replayed_first else order[::-1]:
        context.__enter__()
    for context in order if replayed_first else order[::-1]:
        context.__exit__(None, None, None)
    assert "forward" not in block.__dict__


def test_another_thread_calls_a_block_as_it_is_during_a_run() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Tanh()).double()
    x = torch.ones(3, 2, dtype=torch.float64)
    expected = block(x)
    with rematerialised([block]), ThreadPoolExecutor(1) as pool:
        assert "forward" in block.__dict__
        assert block(x).grad_fn.name() != expected.grad_fn.name()
        found = pool.submit(block, x).result(30.0)
    assert torch.equal(found, expected)
    assert found.grad_fn.name() == expected.grad_fn.name()


def test_runs_of_one_module_in_several_threads() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))).double()
    start = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}

    def loss(p: Any, batch: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return out.pow(2).mean()

    inner = torchopt.inner_loop(
        loss, torchopt.adam(0.1, eps=1e-2), steps=3, derivative="mixed", keep=2
    )

    def run(seed: int) -> Tensor:
        x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x.requires_grad_()
        total = sum((p**2).sum() for p in inner(start, x).params.values())
        return torch.autograd.grad(total, x)[0]  # type: ignore[call-overload,no-any-return]

    seeds = list(range(4)) * 3
    expected = [run(seed) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, seeds))
    assert all(x.norm() > 1e-6 for x in expected)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
    assert all("forward" not in block.__dict__ for block in net)


def test_threads_trace_programs_of_their_own() -> None:
    threads, sizes = 4, 4
    together = threading.Barrier(threads)

    def runs(number: int, execute: str) -> list[Tensor]:
        def loss(p: Any, batch: Tensor) -> Tensor:
            return ((p["a"] * batch) ** 2).sum() * (number + 1)

        inner = torchopt.inner_loop(loss, torchopt.adam, steps=2, execute=execute)
        if execute == "trace":
            together.wait(60)
        found = []
        for size in range(sizes):
            start = torch.ones(2 + number * sizes + size, dtype=torch.float64, requires_grad=True)
            found.append(inner({"a": start}, start.detach() * 0.5, lr=0.1).params["a"])
        return found

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda i: runs(i, "trace"), range(threads)))
    for i, traced in enumerate(found):
        torch.testing.assert_close(traced, runs(i, "eager"), rtol=1e-12, atol=1e-14)


def test_a_change_during_the_search_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loss() -> float:
        return factor

    factor = 1.0
    original = reached._reader

    def late(*given: Any) -> Any:
        nonlocal factor
        factor = 2.0  # as by another thread, after the search
        return original(*given)

    monkeypatch.setattr(reached, "_reader", late)
    seen = reached.Reached(loss)
    before = seen.now().key
    monkeypatch.setattr(reached, "_reader", original)
    assert seen.now().key == fingerprint(loss).key != before


def test_threads_that_search_at_once_see_the_present_state() -> None:
    def loss() -> float:
        return factor

    factor = 1.0
    seen = reached.Reached(loss)
    keys = []
    for factor in (1.0, 2.0, 3.0):  # noqa: B007 - a cell of the loss
        with ThreadPoolExecutor(4) as pool:
            found = {f.key for f in pool.map(lambda _: seen.now(), range(200))}
        keys.append(fingerprint(loss).key)
        assert found == {keys[-1]}
    assert len(set(keys)) == 3
