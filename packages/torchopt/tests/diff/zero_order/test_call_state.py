# SPDX-License-Identifier: Apache-2.0
"""The samples of an estimate see the state that the forward pass of its call saw.

Every function here is s theta times a factor that its own side effect changes. The directions are
signs, so an estimate in one dimension is exact and shows any drift.
"""

from __future__ import annotations

import copy
import functools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchopt.diff.closure import captured
from torchopt.diff.sealed import draws_outside_torch
from torchopt.diff.zero_order import (
    Rademacher,
    ZeroOrder,
    ZeroOrderGradientModule,
    seed_replay,
    zero_order,
)
from torchopt.diff.zero_order.estimators import ESTIMATORS
from torchopt.diff.zero_order.low_rank import LowRank
from torchopt.diff.zero_order.unrolled import InnerLoop, truncated_es
from torchopt.errors import NotDifferentiableError

F64 = torch.float64
COUNT = 1


class Bag:
    """Anything with attributes."""


def with_tensor() -> tuple[Callable[[Tensor], Tensor], Callable[[], Any]]:
    c = torch.ones((), dtype=F64)

    def f(x: Tensor) -> Tensor:
        c.mul_(2)
        return c * x

    return f, c.item


def with_number() -> Any:
    n = 1

    def f(x: Tensor) -> Tensor:
        nonlocal n
        n *= 2
        return n * x

    return f, lambda: n


def with_rebound_tensor() -> Any:
    c = torch.ones((), dtype=F64)

    def f(x: Tensor) -> Tensor:
        nonlocal c
        c = 2 * c
        return c * x

    return f, lambda: c.item()


def with_dict() -> Any:
    state = {"n": 1, "log": []}

    def f(x: Tensor) -> Tensor:
        state["n"] *= 2
        state["log"].append(1)
        return state["n"] * x

    return f, lambda: state["n"]


def with_list() -> Any:
    state = [1.0]

    def f(x: Tensor) -> Tensor:
        state[0] *= 2
        return state[0] * x

    return f, lambda: state[0]


def with_global() -> Any:
    global COUNT
    COUNT = 1

    def f(x: Tensor) -> Tensor:
        global COUNT
        COUNT *= 2
        return COUNT * x

    return f, lambda: COUNT


def with_object() -> Any:
    bag = Bag()
    bag.n, bag.inner = 1, Bag()
    bag.inner.c = torch.ones((), dtype=F64)

    def f(x: Tensor) -> Tensor:
        bag.n *= 2
        bag.inner.c += 0
        return bag.n * bag.inner.c * x

    return f, lambda: bag.n


def with_module() -> Any:
    norm = nn.BatchNorm1d(1, affine=False, momentum=1.0, dtype=F64)
    rows = torch.tensor([[1.0], [3.0]], dtype=F64)

    def f(x: Tensor) -> Tensor:
        factor = 2 - 2 * float(norm.training and norm.num_batches_tracked.item() > 0)
        norm(rows)
        return factor * x

    return f, lambda: 2 * norm.num_batches_tracked.item()


STATES = {
    name.removeprefix("with_"): make for name, make in globals().items() if name[:5] == "with_"
}
PATHS = ("decorated", "estimate", "losses", "seed_replay", "low_rank")


def slope(path: str, f: Callable[[Tensor], Tensor], method: str, vectorized: bool) -> float:
    """Return the estimated slope of `f` at 3."""
    options: dict[str, Any] = {"num_samples": 5, "sigma": 0.5}
    engine = ZeroOrder(Rademacher(), method, vectorized=vectorized, chunk_size=2, **options)
    x = torch.tensor(3.0, dtype=F64)
    if path == "decorated":
        x.requires_grad_()
        value = engine(f)(x)
        assert value.item() == 6.0
        return torch.autograd.grad(value, x)[0].item()
    if path == "estimate":
        return engine.estimate(f, x, seed=0).gradient.item()
    if path == "losses":
        center = engine.center(f, x, seed=0) if engine.estimator.uses_center else None
        rows = [engine.losses(f, x, seed=0, start=i, stop=j) for i, j in ((0, 2), (2, 5))]
        return engine.combine(torch.cat(rows), x, seed=0, center=center).gradient.item()
    if path == "seed_replay":
        (g,) = seed_replay.estimate(
            lambda: f(x), [x], method=method, directions=Rademacher(), seed=0, **options
        ).materialize([x])
        return g.item()
    net = nn.Module()
    net.w = nn.Parameter(x)
    lines = LowRank(method=method, vectorized=vectorized, **options)
    noise = lines.noise({"w": net.w}, 0, 0, 5)
    above, below = (lines.losses(net, lambda m: f(m.w), noise, s) for s in (1.0, -1.0))
    exact = 0.5 * noise.dense["w"]
    torch.testing.assert_close(above - below, 2 * 2 * exact)
    return 2.0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STATES)
def test_samples_see_the_state_of_the_call(name: str, path: str) -> None:
    for method in ("antithetic", "forward"):
        for vectorized in (False, True):
            if name == "module" and vectorized:
                continue  # reads a value
            f, count = STATES[name]()
            assert slope(path, f, method, vectorized) == pytest.approx(2.0), (method, vectorized)
            # only the forward pass has a side effect; the estimate has none
            assert count() == {"decorated": 2}.get(path, 0 if name == "module" else 1)


@pytest.mark.parametrize("name", STATES)
def test_two_calls_and_their_backward_passes_in_any_order(name: str) -> None:
    if name == "module":
        return
    f, count = STATES[name]()
    decorated = zero_order(Rademacher(), "antithetic", num_samples=3, vectorized=False)(f)
    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    values = [decorated(x) for _ in range(3)]
    for k in (1, 0, 2, 1):
        (g,) = torch.autograd.grad(values[k], x, retain_graph=True)
        assert g.item() == pytest.approx(2.0 ** (k + 1))
        assert values[k].item() == 3 * 2.0 ** (k + 1)
    assert count() == 8


class Stateful(ZeroOrderGradientModule, method="antithetic", num_samples=3, sigma=0.5):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(3.0, dtype=F64))
        self.frozen = nn.Parameter(torch.ones((), dtype=F64), requires_grad=False)
        self.register_buffer("c", torch.ones((), dtype=F64))
        self.register_buffer("r", torch.ones((), dtype=F64))
        self.calls = 1
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.c.mul_(2)
        self.r = self.r * 2
        self.calls *= 2
        self.frozen.data.mul_(2)
        factor = self.c * self.r * self.calls * self.frozen * (10.0 if self.drop.training else 1.0)
        return self.w * factor * x

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        return torch.randint(0, 2, sample_shape, dtype=F64) * 2 - 1


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_module_is_evaluated_with_the_state_of_its_forward_pass(vectorized: bool) -> None:
    class Each(Stateful, vectorized=vectorized):
        pass

    module, one = Each(), torch.ones((), dtype=F64)
    first = module(one)
    module.eval()
    second = module(one)
    module.train()
    module.c.fill_(7.0)
    for value in (second, first, second):
        state = copy.deepcopy(module.state_dict())
        (g,) = torch.autograd.grad(value, module.w, retain_graph=True)
        assert g.item() == pytest.approx(value.item() / 3)
        torch.testing.assert_close(module.state_dict(), state, rtol=0, atol=0)
        assert module.training
        assert module.drop.training
        assert module.calls == 4
    assert (first.item(), second.item()) == (3 * 160.0, 3 * 256.0)


# --- random draws ---------------------------------------------------------------------------------

GENERATOR, NUMPY = torch.Generator(), np.random.default_rng(0)
OWN = random.Random(0)
DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand((), dtype=F64),
    "dropout": lambda: nn.functional.dropout(torch.ones((), dtype=F64)),
    "python": random.random,
    "numpy": lambda: np.random.rand(),
    "torch.Generator": lambda: torch.rand((), dtype=F64, generator=GENERATOR),
    "numpy.random.Generator": lambda: NUMPY.random(),
    "random.Random": lambda: OWN.random(),
}


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("name", DRAWS)
def test_samples_repeat_the_draws_of_the_forward_pass(name: str, vectorized: bool) -> None:
    draw = DRAWS[name]
    f = zero_order(Rademacher(), "antithetic", num_samples=4, vectorized=vectorized)(
        lambda x: (1 + draw()) * x
    )
    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    values = [f(x) for _ in range(8)]
    assert len({v.item() for v in values}) > 1
    for value in reversed(values):
        before = torch.get_rng_state(), random.getstate(), GENERATOR.get_state()
        (g,) = torch.autograd.grad(value, x)
        assert g.item() == pytest.approx(value.item() / 3)
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()
        assert torch.equal(before[2], GENERATOR.get_state())


class Environment:
    """Draws in a method."""

    def reward(self, x: Tensor) -> Tensor:
        return x * np.random.rand()


def imports(x: Tensor) -> Tensor:
    import secrets

    return x * secrets.randbelow(9)


def nothing(draw: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: (x, draw)[0]


DRAWING: dict[str, Any] = {
    **{
        name: DRAWS[name] for name in ("python", "numpy", "numpy.random.Generator", "random.Random")
    },
    "a method": Environment().reward,
    "an object": nothing(Environment()),
    "a class": lambda x: Environment().reward(x),
    "a partial": functools.partial(nothing, np.random.rand),
    "a function of numpy": nothing(np.random.rand),
    "an import": imports,
    "a function of the library": nothing(random.sample),
    "a compiled object": nothing(iter([1])),
    "an operation of the user": lambda x: torch.ops.mine.draw(x),
    "a list": [random],
}
SILENT: dict[str, Any] = {
    "torch": lambda x: torch.rand(()) * nn.functional.dropout(x).to(F64),
    "a module": nn.Sequential(nn.Linear(2, 2), nn.Dropout()),
    "a closure": nothing([torch.ones(()), {"a": 1.0}, (F64, torch.device("cpu"))]),
    "a gradient": torch.func.grad(lambda x: x * x),
    "math": nothing(math.sin),
}


@pytest.mark.parametrize("name", [*DRAWING, *SILENT])
def test_generators_of_python_and_numpy_are_copied_if_something_may_draw(name: str) -> None:
    reached = captured({**DRAWING, **SILENT}[name], object)
    assert draws_outside_torch(reached) == (name in DRAWING)


@pytest.mark.parametrize("where", ["argument", "keyword", "function"])
def test_draws_of_an_object_that_is_passed(where: str) -> None:
    def f(x: Tensor, source: Any = None) -> Tensor:
        return (1 + (source or OWN).random()) * x

    def g(x: Tensor, source: Any) -> Tensor:
        return (1 + source.random()) * x

    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    make = zero_order(Rademacher(), "antithetic", num_samples=4)
    args: Any = {"argument": (random,), "keyword": (), "function": ()}[where]
    kwargs: Any = {"source": random} if where == "keyword" else {}
    value = make(f if where == "function" else g)(x, *args, **kwargs)
    before = random.getstate()
    (found,) = torch.autograd.grad(value, x)
    assert found.item() == pytest.approx(value.item() / 3)
    assert before == random.getstate()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ESTIMATORS)
def test_overwritten_arguments(method: str) -> None:
    def f(x: Tensor, c: Tensor) -> Tensor:
        c.mul_(2)
        value = c * x
        x.zero_()
        return value.sum()

    decorated = zero_order(Rademacher(), method, num_samples=6, vectorized=False)(f)
    x = torch.tensor([3.0], dtype=F64, requires_grad=True)
    c = torch.ones((), dtype=F64)
    value = decorated(x.clone(), c)
    assert (value.item(), c.item()) == (6.0, 2.0)
    (g,) = torch.autograd.grad(value, x)
    others = ZeroOrder(Rademacher(), method, num_samples=6).estimate(lambda x: (2 * x).sum(), x)
    if method not in ("naive", "leave_one_out", "optimal_baseline"):
        torch.testing.assert_close(g, others.gradient)
        assert g.item() == pytest.approx(2.0)
    assert c.item() == 2.0
    engine = ZeroOrder(Rademacher(), method, num_samples=6, vectorized=False, sigma=0.5)
    got = engine.estimate(f, torch.tensor([3.0], dtype=F64), c.fill_(1.0), seed=0).gradient
    exact = engine.estimate(lambda x: 2 * x.sum(), torch.tensor([3.0], dtype=F64), seed=0).gradient
    torch.testing.assert_close(got, exact)
    assert c.item() == 1.0


def test_an_argument_overwritten_by_the_caller_is_refused() -> None:
    f = zero_order(Rademacher(), "antithetic")(lambda x, c: c * x)
    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    c = torch.ones((), dtype=F64)
    value = f(x, c)
    c.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_large_tensor_that_was_overwritten_is_refused_by_name() -> None:
    table = torch.ones(2**17, dtype=F64)
    f = zero_order(Rademacher(), "antithetic")(lambda x: table[0] * x)
    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    value = f(x)
    assert torch.autograd.grad(value, x, retain_graph=True)[0].item() == pytest.approx(1.0)
    table.add_(1)
    with pytest.raises(NotDifferentiableError, match=r"expected table, of shape \(131072,\)"):
        value.backward()


@pytest.mark.parametrize("path", ["decorated", "estimate", "seed_replay"])
def test_an_error_half_way_restores_everything(path: str) -> None:
    c, calls = torch.ones((), dtype=F64), []

    def f(x: Tensor) -> Tensor:
        c.mul_(2)
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("mine")
        return c * x

    with pytest.raises(KeyError, match="mine"):
        slope(path, f, "antithetic", False)
    assert c.item() == (2.0 if path == "decorated" else 1.0)


def test_windows_run_the_carried_state_as_the_particles() -> None:
    c = torch.ones((), dtype=F64)

    def step(p: Tensor, s: Tensor, t: int) -> Any:
        c.mul_(2)
        return s + c, s * p

    loop = InnerLoop(lambda p: torch.zeros((), dtype=F64), step, 4)
    es = truncated_es(loop, window=1, num_pairs=2, sigma=0.1)
    state, seen = es.init(None, seed=0), []
    for _ in range(3):
        _, state = es.estimate(torch.ones((), dtype=F64), state)
        seen.append(state.inner.item())
    assert seen == [2.0, 6.0, 14.0]
    assert c.item() == 8.0


# --- tensors that nobody passed -------------------------------------------------------------------


class Holder:
    def __init__(self) -> None:
        self.weight = torch.ones(2, requires_grad=True)

    def loss(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def test_closed_over_tensors_are_refused_by_name() -> None:
    features = nn.Linear(2, 2)
    w = torch.ones(2, requires_grad=True)
    computed = 2 * w
    x = torch.ones(2, requires_grad=True)

    def nested(x: Tensor) -> Tensor:
        def inner() -> Tensor:
            return (w * x).sum()

        return inner()

    decorate = zero_order(Rademacher(), "antithetic", num_samples=2)
    for fn, name in (
        (lambda x: features(x).sum(), r"features\.weight"),
        (nested, "w"),
        (lambda x: (computed * x).sum(), "computed"),
        (Holder().loss, r"self\.weight"),
        (lambda x, tree={"a": [w]}: (tree["a"][0] * x).sum(), r"tree\['a'\]\[0\]"),
    ):
        with pytest.raises(NotDifferentiableError, match=f"depends on .*{name}"):
            decorate(fn)(x)
        with torch.no_grad():
            decorate(fn)(x)
        ZeroOrder(Rademacher()).estimate(fn, x)  # needs no other gradient
    decorate(lambda x: (w.detach() * x).sum())(x).backward()
    features.requires_grad_(False)
    decorate(lambda x: features(x).sum())(x).backward()

    @torch.func.grad
    def outer(w: Tensor) -> Tensor:
        return decorate(lambda x: (w * x).sum())(x.detach())

    with pytest.raises(NotDifferentiableError, match="depends on w:"):
        outer(w.detach())


def test_a_function_may_differentiate_on_its_own() -> None:
    def f(x: Tensor) -> Tensor:
        w = x.detach().clone().requires_grad_()
        with torch.enable_grad():
            (g,) = torch.autograd.grad(w**2, w)
        return g + 0 * w.sum()

    decorated = zero_order(Rademacher(), "antithetic", vectorized=False)(f)
    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    assert torch.autograd.grad(decorated(x), x)[0].item() == pytest.approx(2.0)


def test_entries_that_a_default_container_lost_stay_lost() -> None:
    seen: defaultdict[str, int] = defaultdict(int)
    counts: Counter[str] = Counter()

    def f(x: Tensor) -> Tensor:
        value = x * (1 + seen["a"] + counts["a"])
        seen["b"] = counts["b"] = 2
        seen.pop("a")
        del counts["a"]
        return value

    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    seen["a"] = counts["a"] = 1
    value = zero_order(Rademacher(), "antithetic", num_samples=4, vectorized=False)(f)(x)
    assert (dict(seen), dict(counts)) == ({"b": 2}, {"b": 2})
    (g,) = torch.autograd.grad(value, x)
    assert g.item() == pytest.approx(3.0)
    assert (dict(seen), dict(counts)) == ({"b": 2}, {"b": 2})
