# SPDX-License-Identifier: Apache-2.0
"""The models of the benchmarks have right second derivatives, and are found to have them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.engines import explicit
from benchmarks.torchopt import problems
from benchmarks.torchopt.meta_steps import __main__ as meta_steps
from benchmarks.torchopt.meta_steps import in_torch, rows
from torch import Tensor

from torchopt.errors import SecondDerivativeWarning
from torchopt.params import check_second_order, functional_call

Case = tuple[Callable[[Any], Tensor], Any]


def of_module(name: str) -> Case:
    model, x, labels = problems.make_model(name)

    def loss(params: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(functional_call(model, params, (x,)), labels)

    return loss, dict(model.named_parameters())


def of_transformer() -> Case:
    problem = explicit.Problem(2, 1, 1)
    params = {name: p.requires_grad_() for name, p in problem.start.items()}
    return lambda params: problem.loss(params, problem.tokens), params


def of_row(kind: str) -> Case:
    values = rows.in_single(rows.numbers(kind), torch.as_tensor)
    batch, meta = values["inner"], [values["meta"]] if "meta" in values else []
    if kind in ("maml", "conv", "rl"):
        batch = [x[0] for x in batch]
    params = {name: p.requires_grad_() for name, p in values["params"].items()}
    return lambda params: in_torch.LOSSES[kind][0](params, batch, *meta), params


CASES: dict[str, Callable[[], Case]] = {
    **{name: lambda name=name: of_module(name) for name in problems.MODELS},  # type: ignore[misc]
    "transformer, causal": of_transformer,
    **{kind: lambda kind=kind: of_row(kind) for kind in in_torch.LOSSES},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", CASES)
def test_the_doctor_finds_nothing(name: str) -> None:
    loss, params = CASES[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SecondDerivativeWarning)
        found = check_second_order(loss, params)
    assert found is not None
    assert found.difference is not None
    assert found.forward is not None
    assert abs(found.reverse - found.forward) < 1e-8 * abs(found.reverse)
    assert abs(found.reverse - found.difference) < 1e-4 * abs(found.reverse)


def test_meta_gradients_of_all_ways_are_compared(tmp_path: Path) -> None:
    gradients = {"jit": 1.0, "eager": 1.0 + 1e-6, "compile": 1.5, "again": float("nan")}
    for way, value in gradients.items():
        np.savez(tmp_path / f"row-{way}.npz", np.ones(3), np.array([0.1, value]))
    found = meta_steps.differences(tmp_path, "row")
    assert found["eager"] == pytest.approx(1e-6)
    assert found["compile"] == pytest.approx(0.5)
    assert found["again"] == math.inf
    (tmp_path / "row-jit.npz").unlink()
    found = meta_steps.differences(tmp_path, "row")
    assert set(found) == {"compile", "again"}
    assert found["compile"] == pytest.approx(0.5, rel=1e-5)
    assert meta_steps.differences(tmp_path, "other") == {}
