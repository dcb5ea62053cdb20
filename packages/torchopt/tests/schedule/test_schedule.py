# SPDX-License-Identifier: Apache-2.0
"""Schedules at every count, for numbers and for tensors, and inside an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import torchopt
from torchopt.schedule import (
    cosine_restarts,
    exponential_decay,
    join_schedules,
    linear_schedule,
    polynomial_schedule,
    warmup,
)

CASES: list[tuple[Any, list[float]]] = [
    (
        exponential_decay(1.0, 0.5, 2, 2, staircase=True, end_value=0.2),
        [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.2],
    ),
    (exponential_decay(1.0, 0.25, 1, 2), [1, 1, 0.5, 0.25, 0.125]),
    (exponential_decay(1.0, 2.0, end_value=3.0), [1, 2, 3, 3]),
    (exponential_decay(0.7, 0.0), [0.7, 0.7]),
    (exponential_decay(0.7, 0.5, transition_steps=0), [0.7, 0.7]),
    (exponential_decay(1.0, 0.5, -3), [1, 0.5, 0.25]),
    (exponential_decay(1.0, 0.5, 2, end_value=0.3), [1, 1, 1, 0.5, 0.3]),
    (exponential_decay(1.0, 0.5, end_value=5.0), [5, 5]),
    (polynomial_schedule(1.0, 0.1, 2, 4, 1), [1, 1, 0.60625, 0.325, 0.15625, 0.1, 0.1]),
    (polynomial_schedule(0.3, 0.1, 2, 0), [0.3, 0.3]),
    (linear_schedule(1.0, 0.0, 4, 1), [1, 1, 0.75, 0.5, 0.25, 0, 0]),
]


@pytest.mark.parametrize(("schedule", "expected"), CASES)
def test_values(schedule: Any, expected: list[float]) -> None:
    assert [schedule(count) for count in range(len(expected))] == pytest.approx(expected, abs=1e-15)
    tensors = [torch.as_tensor(schedule(torch.tensor(c))) for c in range(len(expected))]
    assert [t.item() for t in tensors] == pytest.approx(expected, abs=1e-7)


def test_optimizer_counts_from_zero() -> None:
    optimizer = torchopt.sgd(linear_schedule(1.0, 0.0, 4))
    params = torch.tensor(0.0, dtype=torch.float64)
    state = optimizer.init(params)
    steps = []
    for _ in range(5):
        updates, state = optimizer.update(torch.ones((), dtype=torch.float64), state)
        steps.append(-updates.item())
    assert steps == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-15)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_exponential_decay_is_differentiable_in_its_initial_value(count: int) -> None:
    init_value = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    value = exponential_decay(init_value, 0.5, 2)(torch.tensor(count))
    (slope,) = torch.autograd.grad(value, init_value)
    assert slope.item() == 0.5 ** max(count - 2, 0)


@pytest.mark.parametrize("wrong", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_number_where_a_schedule_belongs(wrong: Any) -> None:
    for make in (lambda: warmup(wrong, 3), lambda: join_schedules([wrong, wrong], [2])):
        with pytest.raises(TypeError, match="expected a schedule, .*; constant_schedule makes one"):
            make()


def test_restarts_of_tensors_are_those_of_numbers_at_every_size_of_count() -> None:
    """Period n starts at 2^n - 1: a logarithm rounds to n one update before, from 2^49 on."""
    schedule = cosine_restarts(1.0, 1, factor=2)
    for n in range(1, 53):
        for count in (2**n - 2, 2**n - 1):
            value = schedule(torch.tensor(count))
            assert float(value) == pytest.approx(schedule(count), abs=1e-12), count
