# SPDX-License-Identifier: Apache-2.0
"""Schedules of tensors: derivatives against closed forms, changes in place, and huge counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import torchopt
from torchopt import schedule as S
from torchopt.alias.adagrad import _adagrad_lr_schedule

DOUBLE = torch.float64


@dataclass(frozen=True)
class Case:
    """A schedule with its numbers.

    Attributes:
        make: From the numbers to the schedule.
        values: The numbers.
        closed: The value at a count, from the numbers as tensors.
    """

    make: Callable[..., Any]
    values: tuple[float, ...]
    closed: Callable[..., Tensor]


def half_cosine(part: float) -> float:
    return (1 + math.cos(math.pi * min(max(part, 0.0), 1.0))) / 2


def fall(first: Tensor, last: Tensor, part: float) -> Tensor:
    return last + (first - last) * half_cosine(part)


def cycle(k: int, top: Tensor, div: Tensor, final: Tensor) -> Tensor:
    k = min(k, 19)
    start = top / div
    return fall(start, top, k / 5) if k <= 5 else fall(top, start / final, (k - 5) / 14)


def warm(k: int, start: Tensor, init: Tensor, end: Tensor) -> Tensor:
    return start + (init - start) * k / 4 if k < 4 else fall(init, end, (k - 4) / 10)


def plateau(value: Any, smallest: Any) -> Any:
    reduced = S.ReduceOnPlateau(value, factor=0.5, patience=0, min_value=smallest)
    for _ in range(4):
        reduced.observe(math.nan)
    return reduced


CASES = {
    "constant": Case(S.constant_schedule, (0.7,), lambda k, a: a * 1),
    "polynomial": Case(
        lambda a, b, p: S.polynomial_schedule(a, b, p, 6, 2),
        (0.7, 0.2, 1.7),
        lambda k, a, b, p: (
            b + (a - b) * torch.tensor(1 - min(max(k - 2, 0), 6) / 6, dtype=DOUBLE) ** p
        ),
    ),
    "linear": Case(
        lambda a, b: S.linear_schedule(a, b, 6),
        (0.7, 0.2),
        lambda k, a, b: a + (b - a) * min(k / 6, 1),
    ),
    "exponential": Case(
        lambda a, r: S.exponential_decay(a, r, 2, 3),
        (0.7, 0.8),
        lambda k, a, r: a * r ** (max(k - 2, 0) / 3),
    ),
    "exponential, bounded": Case(
        lambda a, r, e: S.exponential_decay(a, r, 0, 2, staircase=True, end_value=e),
        (0.7, 0.8, 0.45),
        lambda k, a, r, e: a * r ** (k // 2) if k < 4 else e * 1,
    ),
    "growth, bounded": Case(
        lambda a, r, e: S.exponential_decay(a, r, end_value=e),
        (1e-7, 1.1, 1.0),
        lambda k, a, r, e: a * r**k if k < 170 else e * 1,
    ),
    "cosine": Case(
        lambda a, b: S.cosine_decay(a, 7, b), (0.7, 0.2), lambda k, a, b: fall(a, b, k / 7)
    ),
    "restarts": Case(
        lambda a, b: S.cosine_restarts(a, 4, 1, b),
        (0.7, 0.2),
        lambda k, a, b: fall(a, b, k % 4 / 4),
    ),
    "growing restarts": Case(
        lambda a, b: S.cosine_restarts(a, 4, 2, b),
        (0.7, 0.2),
        lambda k, a, b: fall(a, b, k / 4 if k < 4 else (k - 4) / 8 if k < 12 else (k - 12) / 16),
    ),
    "inverse square root": Case(
        lambda a: S.inverse_sqrt(a, 5),
        (0.7,),
        lambda k, a: a * min((k + 1) / 5, math.sqrt(5 / (k + 1))),
    ),
    "pieces": Case(
        lambda a, f, g: S.piecewise_constant(a, {3: f, 8: g}),
        (0.7, 0.5, 0.3),
        lambda k, a, f, g: a * (f if k >= 3 else 1) * (g if k >= 8 else 1),
    ),
    "joined": Case(
        lambda a, r, b: S.join_schedules(
            [S.exponential_decay(a, r), S.cosine_decay(b, 5), S.constant_schedule(a)], [4, 10]
        ),
        (0.2, 1.5, 0.7),
        lambda k, a, r, b: a * r**k if k < 4 else fall(b, 0 * b, (k - 4) / 5) if k < 10 else a * 1,
    ),
    "warm-up": Case(
        lambda s, a, b: S.warmup(S.cosine_decay(a, 10, b), 4, s), (0.1, 0.7, 0.2), warm
    ),
    "warm-up to a peak": Case(
        lambda s, p: S.warmup(S.piecewise_constant(p, {0: 0.5}), 4, s, p),
        (0.1, 0.7),
        lambda k, s, p: s + (p - s) * k / 4 if k < 4 else 0.5 * p,
    ),
    "one cycle": Case(lambda t, d, f: S.one_cycle(t, 20, 0.3, d, f), (0.7, 5.0, 10.0), cycle),
    "plateau": Case(plateau, (0.8, 0.15), lambda k, v, m: 0 * v + m),
    "plateau, above its smallest value": Case(plateau, (0.8, 0.01), lambda k, v, m: v / 16),
    "AdaGrad": Case(_adagrad_lr_schedule, (0.3,), lambda k, r: 1 / (1 + r * k)),
}
COUNTS = (0, 1, 2, 3, 4, 5, 7, 9, 11, 18, 25)
HUGE = (999, 8000, 10**6, 10**9, 2**53 + 1, 2**62 + 5)


def learned(values: tuple[float, ...]) -> list[Tensor]:
    return [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in values]


def slopes(value: Tensor, fields: list[Tensor]) -> list[float]:
    found = torch.autograd.grad(value, fields, allow_unused=True, materialize_grads=True)
    return [f.item() for f in found]


@pytest.mark.parametrize("as_count", [int, torch.tensor], ids=["number", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_derivatives_are_those_of_the_closed_form(name: str, as_count: Any) -> None:
    case = CASES[name]
    fields = learned(case.values)
    with torch.no_grad():
        made = case.make(*fields)
    largest = [0.0] * len(fields)
    for k in COUNTS:
        wanted = case.closed(k, *fields)
        expected = slopes(wanted, fields) if wanted.requires_grad else [0.0] * len(fields)
        got = made(as_count(k))
        assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-12, abs=1e-15)
        found = slopes(got, fields) if got.requires_grad else [0.0] * len(fields)
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-14)
        largest = [max(a, abs(b)) for a, b in zip(largest, found)]
    if "plateau" not in name and "bounded" not in name:
        assert min(largest) > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_a_value_that_changes_in_place_is_followed(name: str) -> None:
    case = CASES[name]
    fields = learned(case.values)
    made = case.make(*fields)
    later = [v * 0.9 for v in case.values]
    with torch.no_grad():
        for field, value in zip(fields, later):
            field.fill_(value)
    for k in COUNTS:
        expected = float(case.make(*later)(k))
        assert float(made(k).detach()) == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert float(made(torch.tensor(k)).detach()) == pytest.approx(
            expected, rel=1e-12, abs=1e-15
        )


@pytest.mark.parametrize("name", CASES)
def test_numbers_and_tensors_agree_at_huge_counts(name: str) -> None:
    case = CASES[name]
    numbers, fields = case.make(*case.values), learned(case.values)
    made = case.make(*fields)
    for k in (*COUNTS, *HUGE):
        expected = float(numbers(k))
        assert math.isfinite(expected)
        assert float(numbers(torch.tensor(k))) == pytest.approx(expected, rel=1e-10, abs=1e-12)
        for count in (k, torch.tensor(k)):
            value = made(count)
            assert float(value.detach()) == pytest.approx(expected, rel=1e-10, abs=1e-12)
            if value.requires_grad:
                assert all(map(math.isfinite, slopes(value, fields)))


@pytest.mark.parametrize("rate", [1.5, -1.5, 0.5, -0.5])
def test_unbounded_powers_agree_where_they_overflow(rate: float) -> None:
    grows = S.exponential_decay(0.5, rate)
    halves = S.exponential_decay(0.5, rate, 0, 2)
    for k in (1, 2, 3, 4000, 4001, 10**9):
        for made in (grows, halves):
            number, tensor = made(k), made(torch.tensor(k)).item()
            assert number == pytest.approx(tensor, rel=1e-12, nan_ok=True)
    assert grows(4000) == (math.inf if abs(rate) > 1 else 0.0)
    power = S.polynomial_schedule(1.0, 0.1, -2.0, 4)
    assert power(4) == power(torch.tensor(4)).item() == math.inf


def test_counts_are_kept_in_double_precision() -> None:
    counts = torch.arange(1000)
    for name, case in CASES.items():
        if name in ("constant",) or "plateau" in name:
            continue
        made = case.make(*case.values)
        expected = torch.tensor([float(made(int(k))) for k in counts], dtype=DOUBLE)
        torch.testing.assert_close(made(counts), expected, rtol=1e-12, atol=1e-15)


METRICS = {
    "diverged": [math.nan] * 12,
    "NaN in between": [3.0, math.nan, 2.0, math.nan, math.nan, 1.0, math.nan, math.nan, math.nan],
    "inf": [math.inf] * 9,
    "-inf": [-math.inf] * 9,
    "both": [math.inf, 2.0, -math.inf, -math.inf, math.inf, math.nan, 0.0, 0.0],
    "flat": [1.0] * 14,
    "slow": [1.0 - 1e-5 * k for k in range(14)],
    "negative": [-1.0 - 0.3 * (k // 3) for k in range(14)],
    "up and down": [5.0, 4.0, 4.0, 4.1, 4.0, 3.9, 3.9, 3.9, 3.9, 3.9, 4.5, 4.6, 4.7, 1.0, 1.0],
}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"factor": 0.5, "patience": 1},
    {"factor": 0.1, "patience": 0, "cooldown": 3},
    {"factor": 0.5, "patience": 0, "min_value": 0.3},
    {"factor": 0.5, "patience": 0, "min_value": 3.0},
    {"factor": 0.5, "patience": 2, "threshold": 0.2, "threshold_mode": "abs"},
    {"factor": 0.1, "patience": 0, "value": 1e-8},
    {"factor": 0.1, "patience": 0, "value": 1e-8, "eps": 0.0},
    {"factor": 0.5, "patience": 0, "eps": 0.2},
)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("metrics", METRICS)
def test_a_plateau_has_the_values_of_torch(metrics: str, maximize: bool) -> None:
    for settings in SETTINGS:
        named = {"value": 1.0} | settings
        ours = S.ReduceOnPlateau(**named, maximize=maximize)
        value, smallest = named.pop("value"), named.pop("min_value", 0.0)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=value)
        theirs = lr_scheduler.ReduceLROnPlateau(
            optimizer, "max" if maximize else "min", min_lr=smallest, **named
        )
        for metric in METRICS[metrics]:
            ours.observe(torch.tensor(metric, dtype=DOUBLE))
            theirs.step(metric)
            assert ours(0) == optimizer.param_groups[0]["lr"]


def test_an_optimizer_differentiates_through_its_schedule() -> None:
    peak = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    optimizer = torchopt.sgd(S.warmup(S.cosine_decay(peak, 10), 4))
    w = torch.tensor(1.0, dtype=DOUBLE)
    state = optimizer.init(w)
    total = 0.0
    for k in range(6):
        updates, state = optimizer.update(torch.ones((), dtype=DOUBLE), state, inplace=False)
        w = w + updates
        total += k / 4 if k < 4 else half_cosine((k - 4) / 10)
    assert torch.autograd.grad(w, peak)[0].item() == pytest.approx(-total, rel=1e-13)
    with pytest.raises(ValueError, match="threshold_mode 'rel' or 'abs', got 'ratio'"):
        S.ReduceOnPlateau(1.0, threshold_mode="ratio")
