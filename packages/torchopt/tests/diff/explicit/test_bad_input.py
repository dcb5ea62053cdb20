# SPDX-License-Identifier: Apache-2.0
"""Invalid loops and calls are refused with a clear message."""

from __future__ import annotations

import builtins
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt.errors import NotDifferentiableError


def loss_of(w: Tensor, batch: Any) -> Tensor:
    return ((w - 1) ** 2).sum()


MADE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no steps": ({"steps": 0}, ValueError, "steps: expected at least 1, got 0"),
    "half a step": ({"steps": 1.5}, TypeError, "steps: expected an int, got float"),
    "a derivative": ({"derivative": "backward"}, ValueError, "derivative: expected one of 'rev"),
    "no snapshots": ({"keep": 0}, ValueError, "keep: expected at least 1, got 0"),
    "nothing to keep": ({"keep": None}, TypeError, r'keep: expected "all".*got None'),
    "half a snapshot": ({"keep": 1.5}, TypeError, r'keep: expected "all".*got 1\.5'),
    "a text": ({"keep": "some"}, ValueError, r'keep: expected "all", "steps", "reversible",'),
    "a window": ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
    "a loss": ({"loss": 3}, TypeError, "loss: expected a function"),
    "a dimension of tasks": ({"tasks": 0}, TypeError, r"tasks: expected a tuple .* got int"),
    "a text among the dimensions of tasks": (
        {"tasks": ("a", 0)}, TypeError, r"tasks: expected ints, or None, .* got 'a'",
    ),
    "a truth among the dimensions of tasks": (
        {"tasks": (None, (0, True))}, TypeError, r"tasks: expected ints, or None, .* got True",
    ),
    "the name of a block": (
        {"blocks": "a", "derivative": "mixed"}, TypeError, r"sequence of names, got 'a'",
    ),
    "an optimizer": ({"optimizer": 0.1}, TypeError, "is not a GradientTransformation"),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_invalid_loops_are_refused(name: str) -> None:
    changed, error, message = MADE[name]
    fields: dict[str, Any] = {"loss": loss_of, "optimizer": torchopt.sgd(0.1), "steps": 2}
    fields |= changed
    with pytest.raises(error, match=message) as raised:
        torchopt.inner_loop(fields.pop("loss"), fields.pop("optimizer"), **fields)
    assert len(str(raised.value)) < 400


CALLED: dict[str, tuple[Any, Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "both kinds of batch": (None, None, (1,), {"batches": [1, 2]}, TypeError, "got both"),
    "too few batches": (None, None, (), {"batches": [1]}, ValueError, "length 2.*got 1"),
    "batches too long": (
        None, None, (), {"batches": torch.ones(3, 4)}, ValueError, "length 2.*got 3",
    ),
    "a vector": (lambda w, b: w, None, (), {}, TypeError, r"0-dim.*of shape \(2,\)"),
    "a number": (lambda w, b: 1.0, None, (), {}, TypeError, "got float"),
    "a constant": (
        lambda w, b: torch.ones(()), None, (), {}, NotDifferentiableError, "does not depend",
    ),
    "a keyword": (None, torchopt.sgd(0.1), (), {"lr": 0.1}, TypeError, "a constructor.*'lr'"),
    "an unknown keyword": (
        None, torchopt.sgd, (), {"lr": 0.1, "learning_rate": 0.2}, TypeError,
        r"that sgd takes \(lr, momentum, .*\), got lr, learning_rate: got an unexpected keyword",
    ),
    "a missing keyword": (
        None, torchopt.sgd, (), {}, TypeError, r"that sgd takes \(lr, .*\), got none: missing",
    ),
    "an unknown keyword of a partial": (
        None, partial(torchopt.adam, eps=1e-3), (), {"rate": 0.2}, TypeError,
        r"that adam takes \(lr, .*\), got rate: got an unexpected keyword",
    ),
}  # fmt: skip


@pytest.mark.parametrize("keep", ["all", "steps"])
@pytest.mark.parametrize("name", CALLED)
def test_invalid_calls_are_refused(name: str, keep: str) -> None:
    loss, optimizer, args, keywords, error, message = CALLED[name]
    inner = torchopt.inner_loop(loss or loss_of, optimizer or torchopt.sgd(0.1), steps=2, keep=keep)
    with pytest.raises(error, match=message) as raised:
        inner(torch.ones(2, requires_grad=True), *args, **keywords)
    assert len(str(raised.value)) < 400


def test_a_module_in_place_of_parameters_is_refused() -> None:
    inner = torchopt.inner_loop(loss_of, torchopt.sgd(0.1), steps=1)
    with pytest.raises(TypeError, match="functional_call"):
        inner(nn.Linear(1, 1))


def test_more_tangents_than_parameters_warn() -> None:
    inner = torchopt.inner_loop(loss_of, torchopt.sgd, steps=1, derivative="forward")
    lr = torch.tensor(0.1, requires_grad=True)
    message = r"parameters \(2\), got 3; each step is taken 3 more"
    with pytest.warns(UserWarning, match=message) as warned:
        inner(torch.ones(2, requires_grad=True), lr=lr)
    assert warned[0].filename == __file__


def test_a_budget_under_a_transform() -> None:
    inner = torchopt.inner_loop(loss_of, torchopt.sgd(0.1), steps=1, keep="1MiB")
    with pytest.raises(ValueError, match="outside of transforms"):
        torch.func.grad(lambda w: inner(w).params.sum())(torch.ones(2))


@pytest.mark.parametrize("options", [{}, {"keep": "steps"}, {"derivative": "mixed"}], ids=str)
def test_a_hidden_tensor_is_never_ignored(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, w = torch.nn.Linear(3, 3), torch.ones(3, requires_grad=True)
    hidden = torch.ones(3, requires_grad=True)
    monkeypatch.setattr(builtins, "HIDDEN", hidden, raising=False)
    monkeypatch.setattr(torch, "HIDDEN", hidden, raising=False)
    losses: list[tuple[Any, Any]] = [
        (lambda w, b, f: (f(w) ** 2).sum(), net),
        (lambda w, b, f: (f(w) ** 2).sum(), lambda x: x * hidden),
        (lambda w, b, f: ((w * HIDDEN) ** 2).sum(), None),  # type: ignore[name-defined]  # noqa: F821
        (lambda w, b, f: ((w * torch.HIDDEN) ** 2).sum(), None),  # type: ignore[attr-defined]
    ]
    for loss, more in losses:
        run = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, **options)
        with pytest.raises(NotDifferentiableError, match="depends on"):
            run(w, None, more)


@pytest.mark.parametrize("options", [{}, {"keep": 1}, {"execute": "trace"}])
def test_inference_mode_is_named_as_the_cause(options: dict[str, Any]) -> None:
    inner = torchopt.inner_loop(loss_of, torchopt.sgd(0.1), steps=2, **options)
    w = torch.zeros(2)
    with torch.no_grad():
        assert not inner(w).losses.requires_grad
    with (
        torch.inference_mode(),
        pytest.raises(NotDifferentiableError, match=r"outside of torch\.inference_mode"),
    ):
        inner(w)


@pytest.mark.parametrize("execute", ["trace", "blocks"])
def test_two_ways_to_execute_are_refused(execute: str) -> None:
    with pytest.raises(ValueError, match=f'compile: expected False for execute="{execute}"'):
        torchopt.inner_loop(
            loss_of, torchopt.sgd, steps=1, derivative="mixed", execute=execute, compile=True
        )
