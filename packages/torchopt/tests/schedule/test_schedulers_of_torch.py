# SPDX-License-Identifier: Apache-2.0
"""Schedules have the values of torch's schedulers, for numbers and for tensors as counts."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import torchopt
from torchopt import schedule

STEPS = 24


CASES: dict[str, tuple[Any, Any]] = {
    "cosine": (
        schedule.cosine_decay(0.5, STEPS, 0.1),
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.1),
    ),
    "restarts": (
        schedule.cosine_restarts(0.5, 5, end_value=0.1),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.1),
    ),
    "growing restarts": (
        schedule.cosine_restarts(0.5, 3, 2),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    ),
    "piecewise": (
        schedule.piecewise_constant(0.5, {4: 0.1, 9: 0.1}),
        lambda o: lr_scheduler.MultiStepLR(o, [4, 9], gamma=0.1),
    ),
    "one cycle": (
        schedule.one_cycle(0.7, STEPS),
        lambda o: lr_scheduler.OneCycleLR(o, 0.7, total_steps=STEPS, cycle_momentum=False),
    ),
    "warm-up": (
        schedule.warmup(schedule.cosine_decay(0.5, 20), 4, 0.05),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.1, 1.0, 4),
                lr_scheduler.CosineAnnealingLR(o, 20),
            ],
            [4],
        ),
    ),
    "exponential": (
        schedule.exponential_decay(0.5, 0.9),
        lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    ),
    "linear": (
        schedule.linear_schedule(0.5, 0.1, 10),
        lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, 10),
    ),
    "constant": (
        schedule.constant_schedule(0.5),
        lambda o: lr_scheduler.LambdaLR(o, lambda _: 1.0),
    ),
    "inverse square root": (
        schedule.inverse_sqrt(0.5, 6),
        lambda o: lr_scheduler.LambdaLR(o, lambda k: min((k + 1) / 6, (6 / (k + 1)) ** 0.5)),
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("name", sorted(CASES))
def test_values_equal_torch(name: str) -> None:
    ours, theirs = CASES[name]
    expected = values_of_torch(theirs)
    assert [float(ours(k)) for k in range(STEPS)] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    tensors = [float(ours(torch.tensor(k))) for k in range(STEPS)]
    assert tensors == pytest.approx(expected, rel=1e-12, abs=1e-15)
    again = pickle.loads(pickle.dumps(ours))
    assert [float(again(k)) for k in range(STEPS)] == [float(ours(k)) for k in range(STEPS)]


def values_of_torch(make: Any) -> list[float]:
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=0.5)
    scheduler = make(optimizer)
    values = [float(optimizer.param_groups[0]["lr"])]
    for _ in range(STEPS - 1):
        optimizer.step()
        scheduler.step()
        values.append(float(optimizer.param_groups[0]["lr"]))
    return values


@pytest.mark.parametrize("maximize", [False, True])
def test_plateaus_equal_torch(maximize: bool) -> None:
    metrics = [5.0, 4.0, 4.0, 4.1, 4.0, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9, 3.9]
    w = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=0.5)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer,
        "max" if maximize else "min",
        factor=0.5,
        patience=1,
        cooldown=2,
        min_lr=0.1,
    )
    ours = schedule.ReduceOnPlateau(
        0.5, factor=0.5, patience=1, cooldown=2, min_value=0.1, maximize=maximize
    )
    stepper = torchopt.sgd(ours)
    for metric in metrics:
        theirs.step(metric)
        ours.observe(metric)
        expected = optimizer.param_groups[0]["lr"]
        assert ours(0) == expected
        g = torch.ones((), dtype=torch.float64)
        assert stepper.update(g, stepper.init(g))[0].item() == -expected
    assert ours(0) < 0.5
    with pytest.raises(ValueError, match=r"expected factor in \(0, 1\), got 2.0"):
        schedule.ReduceOnPlateau(1.0, factor=2.0)


def test_growing_restarts_far_out() -> None:
    restarts = schedule.cosine_restarts(1.0, 7, 3)
    for count in (6, 7, 27, 28, 90, 91, 92, 279, 280, 20000, 123456):
        assert float(restarts(torch.tensor(count))) == pytest.approx(restarts(count), abs=1e-12)


def test_bad_schedules_are_refused() -> None:
    for make, message in (
        (lambda: schedule.cosine_decay(1.0, 0), "decay_steps >= 1, got 0"),
        (lambda: schedule.cosine_restarts(1.0, 3, 0), "factor >= 1, got 3 and 0"),
        (lambda: schedule.warmup(schedule.constant_schedule(1.0), 0), "warmup_steps >= 1, got 0"),
        (lambda: schedule.inverse_sqrt(1.0, 0), "warmup_steps >= 1, got 0"),
        (lambda: schedule.one_cycle(1.0, 2), "a rise and a fall of at least one update"),
        (lambda: schedule.one_cycle(1.0, 20, 1.0), "a rise and a fall of at least one update"),
        (lambda: schedule.one_cycle(1.0, 20, 0.05), "a rise and a fall of at least one update"),
        (lambda: schedule.join_schedules([schedule.constant_schedule(1.0)], [3]), "0 boundaries"),
        (
            lambda: schedule.join_schedules([schedule.constant_schedule(1.0)] * 3, [3, 3]),
            "increasing boundaries",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_a_reduction_of_exactly_eps_is_not_made() -> None:
    """torch's, too, reduces only by more than eps."""
    ours = schedule.ReduceOnPlateau(1.0, factor=0.5, patience=0, eps=0.5)
    weight = torch.nn.Parameter(torch.zeros(()))
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([weight], lr=1.0), factor=0.5, patience=0, eps=0.5
    )
    for metric in (1.0, 2.0, 2.0):
        ours.observe(metric)
        theirs.step(metric)
    assert float(ours(0)) == theirs.get_last_lr()[0] == 1.0
