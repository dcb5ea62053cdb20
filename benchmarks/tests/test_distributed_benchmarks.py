# SPDX-License-Identifier: Apache-2.0
"""The model of many workers obeys its laws, and both sides of a row are compared before timing."""

from __future__ import annotations

import pytest
import torch
from benchmarks.torchopt import distributed, distributed_load, distributed_report


def model(**changes: object) -> distributed.Model:
    numbers = {"task": 0.01, "step": 0.0, "alpha": 0.0, "beta": 0.0, "tasks": 1024, "sums": 2}
    return distributed.Model("collective", **{**numbers, "parameter_bytes": 10**6, **changes})


def test_without_messages_and_steps_the_speed_up_is_the_number_of_workers() -> None:
    for row in distributed.predictions(model()):
        assert row["speed_up"] == pytest.approx(min(row["workers"], row["tasks"]))


def test_a_ring_waits_for_each_worker_twice_a_sum() -> None:
    slow = model(alpha=1e-3, beta=1e-9)
    for n in (2, 8, 1024):
        parts = slow.parts(n, n)
        assert parts["latency of messages"] == pytest.approx(2 * 2 * (n - 1) * 1e-3)
        assert parts["bytes of parameters and gradients"] == pytest.approx(2 * (n - 1) / n * 1e-3)
    last = distributed.predictions(slow)[-1]
    assert last["limit"] == "latency of messages"
    assert last["speed_up"] < 10.0


def test_a_side_with_other_gradients_is_refused() -> None:
    p = torch.zeros(3, requires_grad=True)

    def gives(value: float) -> object:
        return lambda: setattr(p, "grad", torch.full((3,), value))

    distributed_load.check(distributed_load.Row("same", gives(2.0), gives(2.0), [p], None))
    with pytest.raises(RuntimeError, match="other: expected the gradients of by hand"):
        distributed_load.check(distributed_load.Row("other", gives(2.0), gives(3.0), [p], None))


def test_the_check_says_how_far_the_model_is_off() -> None:
    row = {"measured_speed_up": 2.0, "predicted_speed_up": 1.8, "relative_error": -0.1}
    other = {"measured_speed_up": 2.0, "predicted_speed_up": 3.0, "relative_error": 0.5}
    text = distributed_report.check_table({"check": {"rpc 1": row, "rpc 2": other}})
    assert text.endswith("The model's speed-ups over those measured: 0.90 to 1.50 with `rpc`.")


def test_tables_of_predictions_name_workers_and_limits() -> None:
    result = {
        "predictions": {"collective": distributed.predictions(model())},
        "assumptions": distributed.ASSUMPTIONS,
    }
    text = distributed_report.prediction_table(result)
    assert "collective, 1024 tasks" in text
    assert text.count("\n| 1024 ") == 1
    assert text.endswith("ten times as long.")
