# SPDX-License-Identifier: Apache-2.0
"""Results do not depend on torch's default device and default dtype, only on those of arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.diff.zero_order import (
    Directions,
    Guided,
    Orthogonal,
    Rademacher,
    Sobol,
    Sphere,
    ZeroOrder,
)
from torchopt.diff.zero_order.unrolled import InnerLoop, full_es
from torchopt.optimizers.learned import lstm_weights, mlp_weights
from torchopt.params import check_second_order
from torchopt.solvers import quadratic_program
from torchopt.tree import tree_leaves

X = torch.linspace(-1, 1, 4)
W = X.double().requires_grad_()
# Arguments are made here, before the default is another one; on the meta device nothing has a
# value, so that whatever is made there by mistake raises.


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def estimated(directions: Directions) -> Callable[[], Any]:
    engine = ZeroOrder(directions, "antithetic", num_samples=16, sigma=0.125)
    return lambda: engine.estimate(lambda x: (x**2).sum(), X, seed=1)[:3]


def by_a_window() -> Any:
    loop = InnerLoop(torch.zeros_like, lambda p, s, t: (s + p, ((s + p) ** 2).sum()), 2)
    es = full_es(loop, num_pairs=4, sigma=0.1)
    return es.estimate(X, es.init(X, seed=0))[0][:2]


EYE, ONES, ZEROS = torch.eye(3), torch.ones(3), torch.zeros(3)
GENERATOR = torch.Generator()


def checked() -> Any:
    found = check_second_order(lambda p: (p["w"] ** 3).sum(), {"w": W})
    assert found is not None
    return torch.tensor([found.forward, found.difference], dtype=torch.float64, device="cpu")


def injected() -> Any:
    optimizer = torchopt.transform.inject_hyperparams(torchopt.adam)(lr=0.1, betas=(0.8, 0.9))
    return optimizer.update(X, optimizer.init(X), params=X)[0]


def traced() -> Any:
    optimizer = torchopt.adam(torchopt.schedule.cosine_decay(0.1, 4))
    inner = torchopt.inner_loop(lambda p, _: (p**4).sum(), optimizer, steps=3, execute="trace")
    return inner(X, None).params


PROGRAMS: dict[str, Callable[[], Any]] = {
    "sphere": estimated(Sphere()),
    "orthogonal": estimated(Orthogonal(2)),
    "Sobol": estimated(Sobol(16)),
    "guided": estimated(Guided(X[:, None], 0.5)),
    "a window of a loop": by_a_window,
    "quadratic program": lambda: quadratic_program(EYE, ONES, G=-EYE, h=ZEROS),
    "quadratic program, not convex": lambda: quadratic_program(EYE, -ONES, G=EYE, h=ONES),
    "check of second derivatives": checked,
    "injected": injected,
    "traced": traced,
}


@pytest.mark.parametrize(
    "change",
    [lambda: torch.device("meta"), lambda: default_dtype(torch.bfloat16)],
    ids=["device", "dtype"],
)
@pytest.mark.parametrize("name", PROGRAMS)
def test_defaults_of_torch_do_not_matter(name: str, change: Callable[[], Any]) -> None:
    def tensors() -> list[Tensor]:
        found = tree_leaves(PROGRAMS[name]())
        return [x for x in found if isinstance(x, Tensor)]

    expected = tensors()
    with change():
        got = tensors()
    for x, y in zip(got, expected, strict=True):
        assert (x.device, x.dtype) == (y.device, y.dtype)
        assert torch.equal(x, y)


@pytest.mark.parametrize("made", [mlp_weights, lstm_weights])
def test_weights_of_learned_optimizers_are_on_the_default_device(made: Any) -> None:
    with torch.device("meta"):
        weights = made(generator=GENERATOR)
    assert {x.device.type for x in weights.values()} == {"meta"}


def test_sobol_points_near_one_are_finite() -> None:
    with default_dtype(torch.bfloat16):
        z = Sobol(2).draw([torch.zeros(500, dtype=torch.float64)], seed=0, start=0, stop=40)[0]
    assert z.isfinite().all()


def doubled(p: Tensor, batch: Any, scale: Tensor) -> Tensor:
    return (p**4).sum() * scale * (2.0 if torch.empty(0).is_meta else 1.0)


@pytest.mark.parametrize("execute", ["eager", "trace"])
@pytest.mark.parametrize("keep", ["all", "steps", 1])
def test_steps_are_computed_again_with_the_default_device_of_the_call(
    keep: Any, execute: Any
) -> None:
    """torch.autograd.grad and backward() run without it."""
    inner = torchopt.inner_loop(doubled, torchopt.sgd(0.01), steps=3, keep=keep, execute=execute)
    slow = torchopt.inner_loop(doubled, torchopt.sgd(0.01), steps=3, keep="all")
    scale = torch.ones((), requires_grad=True)
    with torch.device("meta"):
        result = inner(X, None, scale)
        (got,) = torch.autograd.grad(result.params[0] + result.losses[-1], scale)
    result = slow(X, None, 2 * scale)
    (expected,) = torch.autograd.grad(result.params[0] + result.losses[-1], scale)
    torch.testing.assert_close(got, expected)


MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "device": lambda: torch.device("meta"),
    "dtype": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def factor() -> float:
    """Return 2 in one of these modes, else 1."""
    made = torch.empty(0)
    special = made.is_meta or made.dtype == torch.float64 or torch.is_autocast_enabled("cpu")
    return 2.0 if special else 1.0


@pytest.mark.parametrize("keep", ["all", "steps", 1])
@pytest.mark.parametrize("mode", MODES)
def test_steps_are_computed_again_in_the_modes_of_the_call(mode: str, keep: Any) -> None:
    def loss(p: Tensor, batch: Any, scale: Tensor) -> Tensor:
        return (p**4).sum() * scale * factor()

    inner = torchopt.inner_loop(loss, torchopt.sgd(0.01), steps=3, keep=keep)
    scale = torch.ones((), requires_grad=True)
    with MODES[mode]():
        result = inner(X, None, scale)
    (got,) = torch.autograd.grad(result.params[0] + result.losses[-1], scale)
    result = inner(X, None, 2 * scale)
    (expected,) = torch.autograd.grad(result.params[0] + result.losses[-1], scale)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_estimates_are_computed_in_the_modes_of_the_call(mode: str, vectorized: bool) -> None:
    """An estimate for a linear function of one number by a sign is exact."""
    engine = ZeroOrder(Rademacher(), "antithetic", sigma=0.5, vectorized=vectorized)
    x = torch.ones((), requires_grad=True)
    with MODES[mode]():
        y = engine(lambda x: x * factor())(x)
    assert torch.autograd.grad(y, x) == (2.0,)
