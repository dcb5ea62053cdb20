# SPDX-License-Identifier: Apache-2.0
"""The zero-order benchmark notices wrong gradients, and its reference is the gradient."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from benchmarks.torchopt.zero_order import report
from benchmarks.torchopt.zero_order.rivals import hand_vmap, ours
from benchmarks.torchopt.zero_order.rivals.torch_mlp import flat, loss, tensors
from benchmarks.torchopt.zero_order.suite import CASES, Case, arrays, check, exact_gradient

SMALL = Case((3, 5, 2), 4, samples=400)


def test_the_gradient_by_hand_is_that_of_autograd() -> None:
    for case in (SMALL, Case((2, 4, 4, 3), 5)):
        weights, x, y = arrays(case)
        params = [p.double().requires_grad_() for p in tensors(weights)]
        value = loss(params, *(t.double() for t in tensors([x, y])))
        expected = flat(list(torch.autograd.grad(value, params)))
        numpy.testing.assert_allclose(exact_gradient(weights, x, y), expected, rtol=1e-10)


@pytest.mark.parametrize("rival", [ours, hand_vmap])
def test_a_wrong_factor_is_noticed(rival: Any) -> None:
    torch.manual_seed(0)
    weights, x, y = arrays(SMALL)
    exact = exact_gradient(weights, x, y)
    run = rival.estimator(SMALL, weights, x, y)
    check(run, SMALL, exact)
    for factor in (2.0, 0.5, -1.0, SMALL.sigma**2):
        with pytest.raises(ArithmeticError, match="the estimate along the gradient is"):
            check(lambda f=factor: f * run(), SMALL, exact)


def test_tables_show_what_was_measured() -> None:
    rivals = {name: {"label": name} for name in ("torchopt", "other")}
    name = next(iter(CASES))
    cells = [
        {"tree": name, "operation": "speed", "rival": r, "gc": False, "status": "ok"}
        | {"min": 0.9 * t, "median": t}
        for r, t in (("torchopt", 0.1), ("other", 0.5))
    ]
    text = report.speed_table({"rivals": rivals, "cells": cells})
    assert "20,000" in text
    assert "5x" in text
    cell = {"tree": "memory", "operation": "memory", "rival": "other", "status": "ok"}
    cell |= {"samples": 500, "peak_bytes": 3 * 2**20}
    assert "3 MiB" in report.memory_table({"rivals": rivals, "cells": [cell]})
    cell = {"tree": "ellipsoid", "operation": "naive", "rival": "other", "status": "ok"}
    cell |= {"samples": 64, "error": 0.25, "evaluations": 65}
    assert "0.25 (65)" in report.error_table({"rivals": rivals, "cells": [cell]})
