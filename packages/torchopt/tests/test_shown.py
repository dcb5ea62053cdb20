# SPDX-License-Identifier: Apache-2.0
"""The `repr` of public values: one short line, without the elements of tensors."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import nn

import torchopt
from torchopt import linear_solve, solvers, transform
from torchopt.diff import Explicit, Implicit, ZeroOrder
from torchopt.schedule import cosine_decay
from torchopt.shown import shown

SGD = torchopt.sgd(0.1)
MATRIX = torch.eye(50)


def first(text: str) -> str:
    return text.partition("(")[0]


@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("name", sorted(ROWS))
def test_an_optimizer_is_shown_as_a_call_with_its_options(name: str, which: int) -> None:
    row, settings = ROWS[name], ROWS[name].settings[which]
    made = row.functional(**settings)
    text = repr(made)
    assert first(text) == ("Partition" if row.name == "muon" else row.name)
    lr = "AdagradSchedule(" if row.name == "adagrad" else shown(settings["lr"])
    assert f"lr={lr}" in text
    assert ("maximize=True" in text) == settings.get("maximize", False)
    for hyper in ("weight_decay", "momentum_decay", "update_every"):
        if settings.get(hyper):
            assert f"{hyper}={settings[hyper]!r}" in text
    assert "\n" not in text
    assert " at 0x" not in text
    assert len(text) < 450
    assert repr(pickle.loads(pickle.dumps(made))) == text


@pytest.mark.parametrize("name", sorted(ROWS))
def test_the_classes_show_what_they_step_and_how(name: str) -> None:
    row, settings = ROWS[name], ROWS[name].settings[-1]
    net = nn.Linear(3, 2)
    classic, meta = row.classic(net.parameters(), **settings), row.meta(net, **settings)
    assert repr(classic) == f"{type(classic).__name__}(2 tensors, {classic.impl!r})"
    assert repr(meta) == f"{type(meta).__name__}(Linear, {meta.impl!r})"


def test_the_trees_of_a_chain_are_shown_as_nested_calls() -> None:
    scaled = torchopt.chain(transform.scale(0.5), torchopt.sgd(cosine_decay(0.1, 10)))
    inside = "chain(Scale(step_size=0.5), sgd(lr=CosineDecay("
    assert repr(scaled).startswith(inside)
    assert repr(torchopt.chain()) == "identity()"
    assert repr(torchopt.chain.flat(SGD)) == repr(SGD) == "sgd(lr=0.1)"
    masked = transform.masked(scaled, {"w": True, "b": MATRIX})
    assert repr(masked).startswith(f"Masked(inner={inside}")
    assert repr(masked).endswith("mask={'w': True, 'b': tensor of shape (50, 50)})")
    native = torchopt.optimizers.native.with_backend(SGD, "reference")
    assert repr(native) == "sgd(lr=0.1, backend='reference')"


def test_a_transformation_of_two_functions_shows_their_names() -> None:
    def begin(params: Any) -> Any:
        return ()

    def go(updates: Any, state: Any, **_: Any) -> Any:
        return updates, state

    own = torchopt.base.GradientTransformation(begin, go)
    assert repr(own) == "GradientTransformation(init=begin, update=go)"


def loss(w: Any, x: Any) -> Any:
    return ((w - x) ** 2).sum()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torchopt.inner_loop(loss, SGD, steps=3, window=1), "Explicit(loss=loss, "),
        (Explicit(), "Explicit()"),
        (Implicit(loss, torchopt.sgd, steps=5), "Implicit(loss=loss, optimizer=sgd, steps=5)"),
        (ZeroOrder(torch.randn, "antithetic", sigma=0.1), "ZeroOrder(distribution=randn, "),
        (linear_solve.CG(maxiter=3, rtol=1e-5, M=MATRIX), "CG(maxiter=3, M=tensor of shape"),
        (solvers.LBFGS(history=4), "LBFGS(history=4)"),
        (solvers.Newton(), "Newton(step_solver=Auto(rtol=1e-10))"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_engines_and_solvers_are_shown_without_their_defaults(value: Any, text: str) -> None:
    assert repr(value).startswith(text)
    assert str(value) == repr(value)
    assert "\n" not in repr(value)
    assert " at 0x" not in repr(value)
    assert len(repr(value)) < 200


def test_fields_of_every_kind_are_short() -> None:
    @dataclasses.dataclass
    class Options:
        given: Any
        kept: Any = 1.0

    class Plain:
        pass

    assert shown(Options(Plain(), 1.0)) == "Options(given=Plain)"
    assert shown(Options([torch.ones(2)], 2.0)) == "Options(given=[tensor of shape (2,)], kept=2.0)"
    assert shown(Options((torch.float64, None))) == "Options(given=(torch.float64, None))"
    assert shown(Options(True, True)) == "Options(given=True, kept=True)"


class Silent:
    """Its repr and its attributes raise."""

    def __repr__(self) -> str:
        raise RuntimeError

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError

    def __call__(self, z: Any) -> Any:
        return z


class SilentNumber(float):
    def __repr__(self) -> str:
        raise RuntimeError


def nested(levels: int) -> Any:
    tree: Any = 0.5
    for _ in range(levels):
        tree = [tree]
    return tree


LOOP: dict[str, Any] = {}
LOOP["again"] = LOOP


@pytest.mark.parametrize(
    "value",
    [
        Silent(),
        SilentNumber(2.0),
        {Silent(): 1.0},
        [Silent()],
        [0.5] * 10_000,
        {f"layer{i}": torch.zeros(3) for i in range(1000)},
        {i: {j: ["x" * 20] * 9 for j in range(50)} for i in range(50)},
        "a" * 10_000,
        nested(20_000),
        LOOP,
    ],
    ids=lambda value: type(value).__name__,
)
def test_large_and_hostile_values_are_shown_in_a_short_line(value: Any) -> None:
    for text in (shown(value), repr(solvers.LevenbergMarquardt(lower=value))):
        assert len(text) < 1000
        assert "\n" not in text
        assert " at 0x" not in text
    mask = repr(transform.masked(SGD, value))
    assert len(mask) < 1000
