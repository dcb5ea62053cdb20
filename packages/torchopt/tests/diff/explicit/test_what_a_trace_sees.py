# SPDX-License-Identifier: Apache-2.0
"""A traced program notices changes of what the loss reads, and refuses what it cannot watch."""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt.errors import NotDifferentiableError, NotTraceableError

SCALE = 2.0


class Private:
    __slots__ = ("__value",)

    def __init__(self, value: float) -> None:
        self.__value = value

    def get(self) -> float:
        return self.__value

    def put(self, value: float) -> None:
        self.__value = value


class Number(float):
    factor: float


def number() -> Number:
    made = Number(1.0)
    made.factor = 2.0
    return made


def exchange(held: list[Any], value: Any) -> None:
    held[0] = value


CHANGES: dict[str, tuple[Any, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a slot with a private name": (Private(2.0), Private.get, lambda x: x.put(5.0)),
    "an attribute of a float": (number(), lambda x: x.factor, lambda x: setattr(x, "factor", 5.0)),
    "a fraction": ([Fraction(1, 2)], lambda x: float(x[0]), lambda x: exchange(x, Fraction(3, 2))),
    "a path": (
        [pathlib.PurePath("a")],
        lambda x: float(len(str(x[0]))),
        lambda x: exchange(x, pathlib.PurePath("abc")),
    ),
    "a number of C": (
        ctypes.c_double(2.0),
        lambda x: x.value,
        lambda x: setattr(x, "value", 5.0),
    ),
    "memory": (memoryview(bytearray(b"\2")), lambda x: x[0], lambda x: x.__setitem__(0, 5)),
    "a sparse matrix": (
        torch.eye(3, dtype=torch.float64).to_sparse(),
        lambda x: (x @ torch.ones(3, 1, dtype=torch.float64)).sum(),
        lambda x: x._values().mul_(3.0),
    ),
    "a scripted module": (
        torch.jit.script(nn.Linear(3, 1).double().requires_grad_(False)),
        lambda x: x(torch.ones(3, dtype=torch.float64)).sum(),
        lambda x: x.weight.copy_(x.weight * 3.0),
    ),
    "the mode of a scripted module": (
        torch.jit.script(nn.LeakyReLU(0.5).eval()),
        lambda x: x(torch.tensor(-1.0, dtype=torch.float64)) + 2.0 * x.training,
        lambda x: x.train(),
    ),
}


def ends(loss: Any, execute: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the result of a run, and the meta-gradient of its sum of squares."""
    meta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.01), steps=2, execute=execute, **options)
    params = inner(start, None, meta).params
    return params, torch.autograd.grad(params.square().sum(), meta)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_value_that_the_loss_reads_is_seen(name: str) -> None:
    held, read, change = CHANGES[name]

    def loss(w: Tensor, batch: Any, meta: Tensor) -> Tensor:
        return (w**2).sum() * meta * read(held)

    first = ends(loss, "trace")
    torch.testing.assert_close(first, ends(loss, "eager"), rtol=1e-12, atol=0)
    change(held)
    second = ends(loss, "trace")
    torch.testing.assert_close(second, ends(loss, "eager"), rtol=1e-12, atol=0)
    assert float((first[1] - second[1]).abs()) > 1e-6


@pytest.mark.parametrize("options", [{"keep": 1}, {"derivative": "mixed"}], ids=str)
def test_a_slot_with_a_private_name_is_put_back_for_a_recomputed_step(
    options: dict[str, Any],
) -> None:
    def found(**options: Any) -> tuple[Tensor, Tensor]:
        held = Private(1.0)

        def loss(w: Tensor, batch: Any, meta: Tensor) -> Tensor:
            held.put(held.get() + 1.0)
            return (w**3).sum() * meta * held.get()

        return ends(loss, "eager", **options)

    torch.testing.assert_close(found(**options), found(), rtol=1e-12, atol=0)


def test_an_exchanged_method_of_a_class_of_torch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2, 2).double().requires_grad_(False)

    def loss(w: Tensor, batch: Any, meta: Tensor) -> Tensor:
        return (layer(w) ** 2).sum() * meta

    ends(loss, "trace")
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 3.0 * x)
    torch.testing.assert_close(ends(loss, "trace"), ends(loss, "eager"), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_exchanged_weights_of_a_recurrent_layer_are_seen(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    layer = kind(2, 3).double().requires_grad_(False)

    def loss(w: Tensor, batch: Any, meta: Tensor) -> Tensor:
        return (layer(w[None])[0] ** 2).sum() * meta

    def double(place: int) -> None:  # inside the list
        weights: list[Tensor] = layer._flat_weights
        weights[place] = weights[place] * 2

    def list_anew() -> None:
        layer._flat_weights = [w * 2 for w in layer._flat_weights]

    def exchange_parameter() -> None:  # so that torch lists them anew
        layer._parameters["bias_hh_l0"] = nn.Parameter(layer.bias_hh_l0 * 3, requires_grad=False)

    changes = [lambda: double(0), list_anew, lambda: double(2), exchange_parameter, list_anew]
    before = ends(loss, "trace")
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.01), steps=2, execute="trace")
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for change in changes:
        change()
        now, same = ends(loss, "trace"), inner(start, None, 0.7).params
        torch.testing.assert_close(now, ends(loss, "eager"), rtol=1e-12, atol=0)
        torch.testing.assert_close(same, now[0], rtol=1e-12, atol=0)
        assert float((now[1] - before[1]).abs()) > 1e-6
        before = now


@pytest.mark.parametrize(
    ("name", "scale"),
    [("globals", lambda: globals()["SCALE"]), ("eval", lambda: eval("SCALE"))],
)
def test_a_function_that_can_read_anything_is_refused(name: str, scale: Any) -> None:
    def loss(w: Tensor, batch: Any, meta: Tensor) -> Tensor:
        return (w**2).sum() * meta * scale()

    with pytest.raises(NotTraceableError, match=rf"a call of {name}\(\)"):
        ends(loss, "trace")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{"keep": "steps"}, {"derivative": "mixed"}, {"execute": "trace"}], ids=str
)
def test_a_scripted_module_that_may_write_its_buffers_is_named(options: dict[str, Any]) -> None:
    norm = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2)).double())

    def loss(w: Tensor, batch: Any, meta: Tensor) -> Tensor:
        return (norm(torch.stack([w, w * w])) ** 3 * w).sum() * meta

    with pytest.raises(NotDifferentiableError, match="a scripted Sequential in training mode"):
        ends(loss, **{"execute": "eager", **options})


def test_a_sparse_constant_in_forward_mode_is_named() -> None:
    matrix = torch.eye(2, dtype=torch.float64).to_sparse()

    def loss(w: Tensor, batch: Any, meta: Tensor) -> Tensor:
        return (matrix @ w[:, None]).square().sum() * meta

    with pytest.raises(NotDifferentiableError, match="a forward mode"):
        ends(loss, "eager", derivative="mixed")


def stepping(*held: Tensor) -> Any:
    """Return gradient descent whose rate is the product of tensors that it holds."""

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
        return torchopt.pytree.tree_map(lambda g: -g * torch.stack(held).prod(), updates), state

    return torchopt.base.GradientTransformation(lambda params: (), update)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"keep": 1},
    {"derivative": "mixed"},
    {"derivative": "first_order"},
    {"derivative": "forward"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_tensors_of_the_loss_and_of_the_optimizer_are_told_apart(
    shared: bool, options: dict[str, Any]
) -> None:
    # The tensor of the loss lies deeper than those of the optimizer; all have one form.
    target, rate, factor = (torch.tensor(x, dtype=torch.float64) for x in (3.0, 0.01, 0.5))
    held = {"a": [{"b": [{"c": target}]}]}

    def loss(params: Tensor, batch: Tensor) -> Tensor:
        deep = held["a"][0]["b"][0]["c"]
        return ((params - deep) ** 2).sum() * batch + (params * factor).sum()

    optimizer = stepping(*((factor, rate) if shared else (rate,)))
    found = {}
    for execute in ("eager", "trace"):
        start = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        inner = torchopt.inner_loop(loss, optimizer, steps=3, execute=execute, **options)
        end = inner(start, torch.tensor(1.0, dtype=torch.float64)).params
        (grad,) = torch.autograd.grad((end**2).sum(), start)
        found[execute] = end.detach(), grad
    torch.testing.assert_close(found["trace"], found["eager"], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [False, True])
def test_an_alias_of_a_tensor_whose_memory_has_two_names(first: bool) -> None:
    held = {"x": torch.tensor([1.0, 2.0]), "y": torch.empty(0)}
    held["y"] = held["x"].view_as(held["x"])
    name = "x" if first else "y"

    def loss(w: Tensor, _: None) -> Tensor:
        return (w * nn.Parameter(held[name], requires_grad=False)).sum()

    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=1, execute="trace")
    with pytest.raises(
        NotTraceableError, match=r"two of them share \(held\['x'\] and held\['y'\]\)"
    ):
        inner(torch.ones(2, requires_grad=True))


def test_an_alias_of_a_negated_view() -> None:
    z = torch.tensor([1.0 + 2.0j, 3.0 - 4.0j])
    plain, negated = z.imag, z.conj().imag

    def loss(w: Tensor, _: None) -> Tensor:
        alias = nn.Parameter(plain, requires_grad=False)
        return (w * alias).sum() + (w**2 * negated).sum()

    def gradient(execute: str) -> Tensor:
        w = torch.ones(2, requires_grad=True)
        inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=1, execute=execute)
        return torch.autograd.grad(inner(w).params.square().sum(), w)[0]

    torch.testing.assert_close(gradient("trace"), gradient("eager"))
