# SPDX-License-Identifier: Apache-2.0
"""The optimizer benchmarks measure what they say, and notice a wrong answer."""

from __future__ import annotations

import importlib
import math
import types
from typing import Any

import pytest
import torch
from benchmarks.harness.case import UnsupportedError
from benchmarks.torchopt import matrices, problems, report, run, suite, tasks
from benchmarks.torchopt.dispatched import Dispatched
from benchmarks.torchopt.rivals import OURS, PUBLISHED, rivals

import torchopt
from torchopt.optimizers.native import Backend, with_backend

MODULES = ("torchopt_api", "torch_foreach", "torch_fused", "torch_for_loop", "hand_written")


def rival(name: str) -> Any:
    return importlib.import_module(f"benchmarks.torchopt.rivals.{name}")


def test_sets_have_the_sizes_of_their_models() -> None:
    shapes = problems.resnet50_shapes()
    assert len(shapes) == 161
    assert sum(math.prod(s) for s in shapes) == 25_557_032
    assert len(problems.transformer_shapes()) == 2 + 12 * 12 + 2
    assert set(run.SETS) == set(problems.SETS)
    assert set(run.MODELS) == set(problems.MODELS)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("operation", ["adam", *run.OPTIMIZERS, "functional", "differentiable"])
def test_every_library_passes_the_check_or_says_that_it_cannot(name: str, operation: str) -> None:
    case = {"operation": operation, "tree": "6 x 1k"}
    try:
        prepared = suite.prepare(rival(name), case)
    except UnsupportedError:
        assert name != "torchopt_api"
        return
    prepared.names["run"]()
    counted = suite.count(rival(name), case)
    if name != "torchopt_api":
        assert counted["aten"] >= 1
    elif operation in ("adam", "sgd"):
        assert counted["aten"] <= 1


@pytest.mark.parametrize("operation", matrices.STEPS)
@pytest.mark.parametrize("name", ["torchopt_api", "torch_for_loop", "hand_written"])
def test_steps_of_matrices_pass_the_check(name: str, operation: str) -> None:
    case = {"operation": operation, "tree": "126 matrices, width 16"}
    if (name, operation) == ("torch_for_loop", "shampoo"):
        with pytest.raises(UnsupportedError):
            suite.prepare(rival(name), case)
        return
    suite.prepare(rival(name), case).names["run"]()


@pytest.mark.parametrize("operation", tasks.OPTIMIZERS)
@pytest.mark.parametrize("name", ["torchopt_api", "learn2learn_loop"])
def test_gradients_of_whole_tasks_agree(name: str, operation: str) -> None:
    case = {"operation": operation, "tree": "6 tensors"}
    try:
        prepared = suite.prepare(rival(name), case)
    except UnsupportedError:
        assert (name, operation) != ("torchopt_api", operation)
        assert operation != "sgd task"
        return
    first, second = (prepared.names["run"]() for _ in range(2))
    torch.testing.assert_close(first, second)  # the network is put back


def test_a_wrong_gradient_of_a_task_is_noticed() -> None:
    case = {"operation": "sgd task", "tree": "6 tensors"}
    right = tasks.expected("sgd task", "6 tensors")
    suite.check(None, case, right)
    with pytest.raises(AssertionError):
        suite.check(None, case, [1.1 * g for g in right])


@pytest.mark.parametrize("model", problems.MODELS)
def test_meta_gradients_agree(model: str) -> None:
    case = {"operation": "meta", "tree": model, "steps": 2}
    suite.prepare(rival("torchopt_api"), case)
    # Two steps are held at once, the parameters of each among them.
    size = sum(4 * p.numel() for p in problems.make_model(model)[0].parameters())
    assert suite.count(rival("torchopt_api"), case)["peak_bytes"] > 2 * size


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_kernels_allocate_counts_as_alive(backend: Backend) -> None:
    optimizer = with_backend(torchopt.adam(), backend)
    params = [torch.ones(1000), torch.ones(500)]
    state = optimizer.init(params)
    with Dispatched() as counter:
        kept = optimizer.update(params, state, params=params, inplace=False)
        torch.ones(1)  # the next operation
    assert kept is not None
    new = 3 * 4 * 1500  # updates and two moments
    assert new <= counter.peak < 2.5 * new


@pytest.mark.parametrize("operation", matrices.STEPS)
def test_a_wrong_step_of_matrices_is_noticed(operation: str) -> None:
    def step_twice(params: list[torch.Tensor], name: str) -> Any:
        step = matrices.one_by_one(params, name)
        return lambda: (step(), step())

    wrong = types.SimpleNamespace(in_place=step_twice)
    with pytest.raises(AssertionError):
        suite.prepare(wrong, {"operation": operation, "tree": "126 matrices, width 16"})


@pytest.mark.parametrize("operation", ["adam", *run.OPTIMIZERS])
def test_a_wrong_answer_is_noticed(operation: str) -> None:
    def step_twice(params: list[torch.Tensor], name: str) -> Any:
        step = rival("torch_foreach").in_place(params, name)
        return lambda: (step(), step())

    wrong = types.SimpleNamespace(in_place=step_twice)
    with pytest.raises(AssertionError):
        suite.prepare(wrong, {"operation": operation, "tree": "6 x 1k"})


def test_tables_show_ratios_and_counts() -> None:
    cells = [
        {"operation": "adam", "tree": "6 x 1k", "rival": OURS, "status": "ok",
         "min": 1e-6, "median": 1e-6, "aten": 1, "peak_bytes": 0},
        {"operation": "adam", "tree": "6 x 1k", "rival": PUBLISHED, "status": "ok",
         "min": 3e-6, "median": 4e-6, "aten": 120, "peak_bytes": 0},
    ]  # fmt: skip
    entries = {r.name: {"label": r.label, "available": True} for r in rivals()}
    text = report.all_tables({"cells": cells, "rivals": entries})
    assert "in place, 6 x 1k" in text
    assert "1 µs" in text
    assert "4x" in text
    assert "120" in text
    heads = [line for line in text.splitlines() if "torchopt 0.7.3" in line]
    assert heads
    assert not any("torch foreach" in head for head in heads)  # which has no figure
