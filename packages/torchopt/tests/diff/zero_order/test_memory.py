# SPDX-License-Identifier: Apache-2.0
"""The memory of an estimate does not grow with samples times model size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.diff.zero_order import Gaussian, ZeroOrder, evaluator, seed_replay, zero_order
from torchopt.diff.zero_order import evaluate as zo_evaluate
from torchopt.diff.zero_order import low_rank as zo_low_rank
from torchopt.diff.zero_order.estimators import antithetic
from torchopt.diff.zero_order.form import Form
from torchopt.diff.zero_order.low_rank import LowRank

D = 20_000


class Watch(TorchDispatchMode):
    """Records the peak of the bytes of all storages that are alive after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                reference = torch.multiprocessing.reductions.StorageWeakRef(storage)
                self.alive[storage._cdata] = (reference, storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def decorated(n: int, method: str) -> None:
    x = torch.zeros(D, requires_grad=True)
    zero_order(torch.randn, method, 0, n, 0.1, chunk_size=8)(lambda p: p.sum())(x).backward()


def estimated(n: int, method: str) -> None:
    engine = ZeroOrder(Gaussian(), method, num_samples=n, sigma=0.1, chunk_size=8)
    engine.estimate(lambda p: p.sum(), torch.zeros(D), seed=0)


def combined(n: int, method: str) -> None:
    engine = ZeroOrder(Gaussian(), method, num_samples=n, sigma=0.1, chunk_size=8)
    losses = engine.losses(lambda p: p.sum(), torch.zeros(D), seed=0)
    engine.combine(losses, torch.zeros(D), seed=0)


def replayed(n: int, method: str) -> None:
    p = torch.zeros(D)
    gradient = seed_replay.estimate(lambda: p.sum(), [p], method=method, num_samples=n, seed=0)
    gradient.add_to_([p], -0.1)


def low_rank(n: int, method: str) -> None:
    net = nn.Linear(D // 100, 100)
    LowRank(1, method, num_samples=n, chunk_size=8).estimate(
        net, lambda m: m(torch.ones(1, D // 100)).sum(), seed=0
    )


@pytest.mark.parametrize("run", [decorated, estimated, combined, replayed, low_rank])
@pytest.mark.parametrize("method", ["antithetic", "leave_one_out"])
def test_peak_does_not_grow_with_samples(run: Any, method: str) -> None:
    peaks = []
    for n in (16, 128):
        with Watch() as watch:
            run(n, method)
        peaks.append(watch.peak)
    # 112 samples more would be 112 D floats; their losses and coefficients are a few numbers each
    assert peaks[0] > 4 * D
    assert peaks[1] - peaks[0] < 112 * 100
    if run is replayed:  # the copy, one direction and temporaries
        assert peaks[1] < 6 * 4 * D


@pytest.mark.parametrize("module", [zo_evaluate, zo_low_rank])
def test_the_default_chunk_is_bounded(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENTRIES_PER_CHUNK", 8 * D)
    peaks = []
    for n in (64, 256):
        with Watch() as watch:
            if module is zo_evaluate:
                ZeroOrder(Gaussian(), "antithetic", num_samples=n).estimate(
                    lambda p: p.sum(), torch.zeros(D), seed=0
                )
            else:
                LowRank(1, num_samples=16 * n).estimate(
                    nn.Linear(99, 100), lambda m: m(torch.ones(1, 99)).sum(), seed=0
                )
        peaks.append(watch.peak)
    # 192 directions of D floats more, or 16 times as many of 299 each
    more = 4 * (192 * D if module is zo_evaluate else 192 * 16 * 299)
    assert peaks[1] - peaks[0] < 0.3 * more


def test_points_in_several_groups_have_the_losses_of_a_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each group draws the same numbers inside of the function, and gets its own scratch."""
    monkeypatch.setattr(evaluator, "ENTRIES", 12)
    monkeypatch.setattr(evaluator, "LEAST_ROWS", 2)
    groups = []

    def loss(x: Tensor, scratch: Tensor) -> Tensor:
        groups.append(1)
        scratch.add_(x)
        return (scratch * torch.rand(3, dtype=x.dtype)).sum() ** 2

    generator = torch.Generator().manual_seed(0)
    points = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    scratch = torch.ones(3, dtype=torch.float64)
    before = torch.get_rng_state()
    rows = evaluator.Points.stored([points])
    found = evaluator.Evaluator(True)(loss, rows, [scratch], 5)
    assert len(groups) == 4  # of two points of six entries each
    expected = evaluator.Evaluator(False)(loss, rows, [scratch], 5)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
    assert torch.equal(scratch, torch.ones(3, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize(("most", "calls"), [(12, 1), (11, 4)])
def test_few_points_at_several_places_are_taken_together(
    most: int, calls: int, shape: tuple[int, ...]
) -> None:
    """The values stay in rows, one for each direction, and the groups hold no point twice."""
    theta, z = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    steps, groups = (0.5, -0.5, 1.0, -1.0), []

    def loss(x: Tensor) -> Tensor:
        groups.append(1)
        return (x @ torch.tensor([1.0, 10.0])).expand(shape).clone()

    form = Form([theta], Gaussian(), antithetic)
    points = evaluator.Points(3, 4, 2, form.perturbed([theta], [z], steps), [theta], most)
    found = evaluator.Evaluator(True)(loss, points, (), 0)
    assert len(groups) == calls
    rows = torch.stack([theta + s * row for row in z for s in steps])
    expected = (rows @ torch.tensor([1.0, 10.0])).reshape(-1, *(1 for _ in shape))
    assert torch.equal(found, expected.expand(12, *shape))
    assert torch.equal(found, evaluator.Evaluator(False)(loss, points, (), 0))


def test_a_chunk_of_members_is_as_large_as_their_factors_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A weight [m, n] takes r (m + n) numbers for each member, a bias as many as it has."""
    drawn, noise = [], LowRank.noise

    def watched(self: LowRank, params: Any, seed: int, start: int, stop: int) -> Any:
        drawn.append((start, stop))
        return noise(self, params, seed, start, stop)

    monkeypatch.setattr(LowRank, "noise", watched)
    monkeypatch.setattr(zo_low_rank, "ENTRIES_PER_CHUNK", 16 * (3 * (100 + 99) + 100))
    LowRank(3, num_samples=40).estimate(nn.Linear(99, 100), lambda m: m(torch.ones(99)).sum())
    assert drawn == [(0, 16), (16, 32), (32, 40)]


@pytest.mark.parametrize(
    ("count", "sizes"), [(9, [3, 3, 3]), (10, [4, 4, 2]), (4, [4]), (5, [3, 2])]
)
def test_groups_of_points_are_few_and_about_equal(
    count: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluator, "ENTRIES", 16)  # four points of three entries and one more
    monkeypatch.setattr(evaluator, "LEAST_ROWS", 2)
    points = torch.arange(3.0 * count).reshape(count, 3)
    groups = [x for (x,) in evaluator.Points.stored([points]).groups(1)]
    assert [len(x) for x in groups] == sizes
    assert torch.equal(torch.cat(groups), points)
