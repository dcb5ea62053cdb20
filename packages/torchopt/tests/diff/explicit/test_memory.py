# SPDX-License-Identifier: Apache-2.0
"""The peak number of bytes alive, counted operation by operation."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torchopt
from torchopt.diff.explicit import dispatch, host, run
from torchopt.diff.explicit.budget import in_bytes, shown
from torchopt.diff.explicit.memory import CountBytes
from torchopt.tree_function import apply_sweep


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) / 10


BATCH = (draw(16, 32, seed=0), draw(16, 8, seed=1))
START = {"a": draw(32, 64, seed=2), "b": draw(64, 8, seed=3)}
STATE = 3 * 8 * sum(x.numel() for x in START.values())  # parameters and two moments


def loss_of(p: Any, batch: Any) -> Tensor:
    return ((torch.tanh(batch[0] @ p["a"]) @ p["b"] - batch[1]) ** 2).mean()


def peak(steps: int, keep: Any, derivative: str = "reverse") -> int:
    params = {k: x.clone().requires_grad_() for k, x in START.items()}
    inner = torchopt.inner_loop(
        loss_of, torchopt.adam(0.1), steps=steps, keep=keep, derivative=derivative
    )
    with CountBytes() as count:
        result = inner(params, BATCH)
        sum((x**2).sum() for x in result.params.values()).backward()  # type: ignore[union-attr]
    return count.peak


@pytest.mark.parametrize("mode", [FakeTensorMode, lambda: torch.device("meta")])
def test_tensors_without_memory_are_not_counted(mode: Any) -> None:
    with CountBytes() as count:
        real = torch.ones(8)
        with mode():
            shape = torch.empty(1024)
    assert shape.untyped_storage().nbytes() == 4096
    assert count.peak == count.now == 4 * real.numel()


@pytest.mark.parametrize(("derivative", "states"), [("reverse", 1), ("mixed", 4 / 3)])
def test_only_the_states_grow_with_the_steps(derivative: str, states: float) -> None:
    # From where the last steps whose graph is kept take all their room.
    slope = (peak(60, "steps", derivative) - peak(50, "steps", derivative)) / 10
    assert slope == pytest.approx(states * STATE, rel=0.02)  # "mixed" keeps the gradients too


def test_with_snapshots_memory_does_not_grow_with_the_steps() -> None:
    short, long = peak(10, 2), peak(15, 2)
    assert long - short < 0.1 * STATE


@pytest.mark.parametrize(("derivative", "kib"), [("reverse", 660), ("mixed", 720)])
def test_a_run_stays_within_its_budget(derivative: str, kib: int) -> None:
    assert peak(10, "steps", derivative) > kib * 2**10
    assert peak(10, f"{kib}KiB", derivative) <= kib * 2**10


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(ValueError, match="expected a budget of at least") as raised:
        peak(5, "100KiB")
    least = re.search(r"at least (\d+KiB)", str(raised.value))
    assert least is not None
    assert len(str(raised.value)) < 400
    assert peak(5, least[1]) <= int(least[1][:-3]) * 2**10


class WithBuffer(nn.Module):
    """A layer that writes to a buffer larger than its parameters."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8)
        self.register_buffer("seen", torch.zeros(20_000))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1.0)
        out: Tensor = self.layer(x) * self.seen[0]
        return out


def with_aux(p: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return loss_of(p, batch), torch.tanh(batch[0] @ p["a"]).repeat(4, 4)


GROWING = [(draw(8 * t, 32, seed=t), draw(8 * t, 8, seed=t + 9)) for t in range(1, 9)]
WRITING = WithBuffer().double()
# (loss, parameters, batches)
LARGE: dict[str, tuple[Any, Any, Any]] = {
    "batches of several sizes": (loss_of, START, GROWING),
    "auxiliary outputs": (with_aux, START, [BATCH] * 8),
    "buffers": (
        lambda p, b: torchopt.params.functional_call(WRITING, p, b[0]).sub(b[1]).pow(2).mean(),
        dict(WRITING.named_parameters()),
        [BATCH] * 8,
    ),
}


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("derivative", ["reverse", "mixed", "first_order"])
@pytest.mark.parametrize("name", LARGE)
def test_a_budget_counts_all_that_a_run_keeps(
    name: str, derivative: str, window: int | None
) -> None:
    loss, start, batches = LARGE[name]

    def peak(keep: str) -> int:
        params = {k: x.detach().clone().requires_grad_() for k, x in start.items()}
        options: dict[str, Any] = {"derivative": derivative, "window": window, "keep": keep}
        inner = torchopt.inner_loop(loss, torchopt.adam(0.1), steps=8, **options)
        with CountBytes() as count:
            result = inner(params, batches=batches)
            found = (result.params, result.losses, result.aux)
            total = sum(x.sum() for x in torchopt.tree.tree_leaves(found))
            total.backward()
        return count.peak

    with pytest.raises(ValueError, match="expected a budget of at least") as raised:
        peak("1KiB")
    for pattern in (r"at least (\d+KiB)", r"with (\d+KiB) every state is kept"):
        budget = re.search(pattern, str(raised.value))
        assert budget is not None
        assert peak(budget[1]) <= (in_bytes(budget[1]) or 0)


@pytest.mark.parametrize("execute", ["eager", "trace"])
def test_a_budget_bounds_what_forward_mode_carries(execute: str) -> None:
    def peak(keep: str) -> int:
        lr, eps = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.01))
        inner = torchopt.inner_loop(
            loss_of, torchopt.adam, steps=3, derivative="forward", keep=keep, execute=execute
        )
        inner(START, BATCH, lr=lr, eps=eps)  # what is traced stays
        with CountBytes() as count:
            result = inner(START, BATCH, lr=lr, eps=eps)
            sum((x**2).sum() for x in result.params.values()).backward()  # type: ignore[union-attr]
        return count.peak

    with pytest.raises(ValueError, match=r"at least \d+KiB.*carries 2 copies") as raised:
        peak("1KiB")
    budget = re.search(r"at least (\d+KiB)", str(raised.value))
    assert budget is not None
    assert peak(budget[1]) <= (in_bytes(budget[1]) or 0)


def test_a_trial_of_forward_mode_takes_velocities_without_tangents() -> None:
    """The tangent of a velocity of zeros has no memory; torch crashed when its bytes were read."""
    found = []
    for keep in ("all", "16MiB"):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        inner = torchopt.inner_loop(
            lambda p, b, h: ((p * h - b) ** 2).sum(),
            torchopt.sgd(0.1, momentum=0.5),
            steps=3,
            derivative="forward",
            keep=keep,
        )
        result = inner(torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), lr)
        found += torch.autograd.grad(result.losses.sum(), lr)
    assert torch.equal(*found)


def test_a_trial_step_leaves_no_trace() -> None:
    module = nn.Sequential(nn.Linear(32, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)).double()

    def loss(p: Any, batch: Any) -> Tensor:
        out: Tensor = torchopt.params.functional_call(module, p, batch[0])
        return ((out - batch[1]) ** 2).mean()

    found = []
    for keep in ("steps", "4MiB"):
        torch.manual_seed(0)
        module[1].reset_running_stats()
        params = {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()}
        result = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=3, keep=keep)(params, BATCH)
        total = sum((x**2).sum() for x in result.params.values())
        grads = torch.autograd.grad(total, list(params.values()))
        found.append((*grads, *(b.clone() for b in module.buffers()), torch.rand(2)))
    assert all(map(torch.equal, *found))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 64)
        self.drop = nn.Dropout(0.2)
        self.back = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.wide(self.norm(x)))
        out: Tensor = x + self.back(torch.tanh(self.drop(hidden)) * hidden)
        return out


def of_blocks(depth: int, blocks: Any, derivative: str = "mixed") -> tuple[int, list[Tensor]]:
    torch.manual_seed(0)
    net = nn.Sequential(*(Block() for _ in range(depth))).double()
    x, scale = draw(128, 8, seed=4), torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(p: Any, batch: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = torchopt.params.functional_call(net, p, batch)
        return (out * scale).pow(2).mean()

    params = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    inner = torchopt.inner_loop(
        loss, torchopt.sgd(0.1), steps=2, keep="steps", derivative=derivative, blocks=blocks
    )
    with CountBytes() as count:
        result = inner(params, x, scale)
        total = result.losses.sum() + sum((p**2).sum() for p in result.params.values())
        grads = torch.autograd.grad(total, [scale, *params.values()])
    return count.peak, list(grads)


def test_recomputed_blocks_keep_only_their_inputs() -> None:
    found = {(d, b): of_blocks(d, b) for d in (2, 6) for b in (None, ())}
    growth = {b: found[6, b][0] - found[2, b][0] for b in (None, ())}
    assert growth[None] < growth[()] / 3
    _, expected = of_blocks(6, (), "reverse")
    for blocks in (None, (), ["0", "3"]):
        for x, y in zip(expected, of_blocks(6, blocks)[1]):
            torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-14)


def test_blocks_without_mixed_mode_are_refused() -> None:
    def loss(p: Tensor, batch: Any) -> Tensor:
        return p.square().sum()

    with pytest.raises(ValueError, match=r'blocks: expected derivative="mixed"'):
        torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=1, blocks=["0"])


def test_unknown_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks: expected names of sub-modules"):
        of_blocks(2, ["layer7"])


@pytest.mark.parametrize("keep", ["steps", 2, "720KiB"])
@pytest.mark.parametrize("derivative", ["reverse", "mixed"])
def test_states_on_the_host_are_fetched_one_by_one(
    derivative: str, keep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the CPU were a device: copies are kept, and each is fetched for its step.
    monkeypatch.setattr(host, "is_away", lambda x: True)
    moved: list[int] = []
    to_host = host._to_host

    def counted(x: Tensor) -> Tensor:
        moved.append(x.numel())
        return to_host(x)

    monkeypatch.setattr(host, "_to_host", counted)
    found = []
    for keep_on in ("device", "host"):
        params = {k: x.clone().requires_grad_() for k, x in START.items()}
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        inner = torchopt.inner_loop(
            loss_of, torchopt.adam, steps=7, keep=keep, derivative=derivative, keep_on=keep_on
        )
        total = sum((x**2).sum() for x in inner(params, BATCH, lr=lr).params.values())
        found.append(torch.autograd.grad(total, [lr, *params.values()]))
        assert bool(moved) is (keep_on == "host")
    assert all(map(torch.equal, *found))


def test_a_graph_cannot_be_kept_on_the_host() -> None:
    with pytest.raises(ValueError, match='expected "device" with keep="all"'):
        torchopt.inner_loop(loss_of, torchopt.sgd, steps=2, keep_on="host")
    with pytest.raises(ValueError, match="keep_on: expected"):
        torchopt.inner_loop(loss_of, torchopt.sgd, steps=2, keep=1, keep_on="disk")


@pytest.mark.parametrize(("window", "keeps"), [(None, "steps"), (33, "steps"), (None, 33)])
def test_short_steps_are_reversed_several_at_once(
    window: int | None, keeps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each step has its own batch, draws a mask, counts in a buffer and has an auxiliary output.
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).double()
    groups: list[range] = []
    single = run.pull_back_steps

    def watched(*args: Any) -> Any:
        groups.append(args[3])
        return single(*args)

    monkeypatch.setattr(run, "pull_back_steps", watched)
    monkeypatch.setattr(dispatch, "ROOM", 2**16)

    def loss(p: Any, batch: Any, scale: Tensor) -> tuple[Tensor, Tensor]:
        out: Tensor = torchopt.params.functional_call(module, p, batch)
        return (out * scale - 1).pow(2).mean(), out.sum()

    found = []
    for keep in ("all", keeps):
        torch.manual_seed(0)
        module[1].reset_running_stats()
        params = {k: x.detach().clone().requires_grad_() for k, x in module.named_parameters()}
        batches, lr = draw(40, 5, 3, seed=4), torch.tensor(0.1, dtype=torch.float64)
        scale = torch.tensor(2.0, dtype=torch.float64)
        inner = torchopt.inner_loop(loss, torchopt.adam, steps=40, keep=keep, window=window)
        wanted = [x.requires_grad_() for x in (batches, lr, scale)]
        result = inner(params, None, scale, batches=batches, lr=lr)
        total = sum((x**2).sum() for x in result.params.values())
        total = total + (result.losses * torch.arange(40)).sum() + result.aux.sin().sum()
        if window is None:
            wanted += params.values()
        found.append(torch.autograd.grad(total, wanted))
    assert max(map(len, groups)) > 1
    taken = sorted(t for group in groups for t in group)
    # If all states are kept, the last steps keep their graphs too.
    end = 40 if keeps == 33 and window is None else taken[-1] + 1
    assert taken == list(range(40 - (window or 40), end))
    assert keeps == 33 or end < 40
    for x, y in zip(*found):
        assert x.norm() > 1e-6
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [1, 4])
def test_the_last_of_large_steps_keeps_its_graph(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[range] = []
    single = run.pull_back_steps

    def watched(*args: Any) -> Any:
        taken.append(args[3])
        return single(*args)

    monkeypatch.setattr(run, "pull_back_steps", watched)
    monkeypatch.setattr(dispatch, "ROOM", 1)  # no step is small
    found = []
    for keep in ("all", "steps"):
        params = {k: x.clone().requires_grad_() for k, x in START.items()}
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        inner = torchopt.inner_loop(loss_of, torchopt.adam, steps=steps, keep=keep)
        total = sum((x**2).sum() for x in inner(params, BATCH, lr=lr).params.values())
        found.append(torch.autograd.grad(total, [lr, *params.values()]))
    assert taken == [range(t, t + 1) for t in reversed(range(steps - 1))]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [32, 48])
def test_steps_reversed_at_once_take_little_memory(steps: int) -> None:
    def peaks(room: int) -> int:
        params = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        call = torchopt.inner_loop(
            lambda p, x: ((p - x) ** 2).sum(), torchopt.adam(0.1), steps=steps
        )
        made = run.Run(call._call(params, draw(3, seed=0), (), None, None, {}, None), steps, room)
        with CountBytes() as count:
            outputs = made.outputs_with(apply_sweep(made, *made.call.inputs))
            outputs.carry.smooth[0].sum().backward()
        return count.peak

    one_by_one, together = peaks(0), peaks(dispatch.ROOM)
    assert one_by_one < together <= one_by_one + dispatch.ROOM


@pytest.mark.parametrize(("letter", "power"), [("K", 1), ("M", 2), ("G", 3)])
def test_a_budget_has_binary_and_decimal_units(letter: str, power: int) -> None:
    assert in_bytes("7B") == 7
    assert in_bytes(f" 1.5 {letter}iB") == int(1.5 * 1024**power)
    assert in_bytes(f"1.5{letter}B") == int(1.5 * 1000**power)
    assert in_bytes(f"1.5{letter}") is None
    assert shown(12 * 1024**power) == f"12{letter}iB"
    assert shown(12 * 1024**power + 1) == f"13{letter}iB"


@pytest.mark.parametrize(
    "options",
    [{"execute": e, "keep": k} for e in ("eager", "trace") for k in ("all", "steps", 2)]
    + [{"execute": "trace", "unroll": 2}],
)
def test_a_run_is_freed_with_its_results(options: dict[str, Any]) -> None:
    params = {k: x.clone().requires_grad_() for k, x in START.items()}
    inner = torchopt.inner_loop(loss_of, torchopt.adam(0.1), steps=4, **options)

    def gradient() -> None:
        result = inner(params, BATCH)
        torch.autograd.grad(sum((x**2).sum() for x in result.params.values()), params.values())

    gradient()  # what is traced, and remembered, stays
    gc.collect()
    gc.disable()  # which would free a cycle
    try:
        with CountBytes() as count:
            gradient()
            left = count.now
            gc.collect()
            assert left == count.now
    finally:
        gc.enable()
