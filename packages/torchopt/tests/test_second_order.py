# SPDX-License-Identifier: Apache-2.0
"""A function that contains a gradient, compiled as one program, gives the same or raises."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import types
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt.diff.explicit.trace import programs
from torchopt.errors import CompilerError, NotTraceableError
from torchopt.second_order import compile as compile_second_order
from torchopt.tree import tree_leaves

DOUBLE = torch.float64


class Potential(nn.Module):
    """Energies and forces of points."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 1)
        self.middle = nn.Identity() if middle is None else middle
        self.register_buffer("scale", torch.tensor(0.5))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.last(self.middle(torch.tanh(self.first(x)))) * self.scale
            (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, -slope


def force_loss(model: Any, x: Tensor, wanted: Tensor) -> Tensor:
    return ((model(x)[1] - wanted) ** 2).mean()


def data(count: int = 4) -> tuple[Tensor, Tensor]:
    found = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return found[0], found[1]


def results(function: Callable[..., Any], args: Sequence[Any], at: Sequence[Tensor]) -> list[Any]:
    """Return the tensors of a value, and the gradients of a weighted sum of them."""
    torch.manual_seed(0)
    values = [x for x in tree_leaves(function(*args)) if isinstance(x, Tensor)]
    total = [(x * torch.arange(1.0, x.numel() + 1).view(x.shape)).sum() for x in values]
    graph = [x for x in total if x.requires_grad]
    grads = torch.autograd.grad(graph, at, allow_unused=True) if graph else ()
    return [*values, *grads]


def assert_same(fast: Any, function: Any, args: Sequence[Any], at: Sequence[Tensor]) -> None:
    got, wanted = results(fast, args, at), results(function, args, at)
    assert [x.requires_grad for x in got if x is not None] == [
        x.requires_grad for x in wanted if x is not None
    ]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)


def traced(function: Any) -> Any:
    return compile_second_order(function, execute="trace")


@pytest.mark.parametrize(
    "function",
    [
        force_loss,
        lambda model, x, wanted: model(x),
        lambda model, x, wanted: {"e": model(x)[0].detach(), "n": 3, "l": model(x)[1].sum()},
        lambda model, x, wanted: (force_loss(model, x, wanted), x, None),
    ],
    ids=["a loss", "several tensors", "a tree", "a loss, an argument, None"],
)
def test_values_and_gradients_of_everything_returned(function: Any) -> None:
    model = Potential()
    at = list(model.parameters())
    assert_same(traced(function), function, (model, *data()), at)


@pytest.mark.parametrize(
    "function",
    [
        lambda z, y: (torch.autograd.grad((z**3 * y).sum(), z, create_graph=True)[0] ** 2).sum(),
        lambda z, y: (torch.func.grad(lambda x: (x**3 * y).sum())(z) ** 2).sum(),
        lambda z, y: torch.func.hessian(lambda x: (x**4).sum())(z) @ y,
    ],
    ids=["autograd", "torch.func", "Hessian"],
)
def test_derivatives_of_arguments(function: Any) -> None:
    z, y = (torch.randn(3, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    fast = traced(function)
    assert_same(fast, function, (z, y), (z, y))
    doubled = [x * 2 for x in (z, z)]
    got, wanted = (results(f, (x, y.detach()), (z,)) for f, x in zip((fast, function), doubled))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    assert_same(fast, function, (z, z), (z,))


def test_every_call_reads_the_state_of_the_model() -> None:
    model = Potential(nn.Dropout(0.5))
    fast, at = traced(model), lambda: [p for p in model.parameters() if p.requires_grad]
    x, _ = data()

    def check(*, anew: bool) -> None:
        before = programs().traced
        assert_same(fast, model, (x,), at())
        assert programs().traced == before + anew

    check(anew=True)
    check(anew=False)
    with torch.no_grad():
        model.first.weight.mul_(2)
    model.scale.fill_(3.0)
    model.last = nn.Linear(5, 1).double()
    model.scale = torch.tensor(0.25, dtype=DOUBLE)
    model.first.bias.data = torch.randn(5, dtype=DOUBLE)
    check(anew=False)
    model.eval()
    check(anew=True)
    model.first.weight.requires_grad_(False)
    check(anew=True)
    x, _ = data(6)
    check(anew=True)
    model.middle = nn.Tanh()
    check(anew=True)
    model.first.register_forward_hook(lambda *_: _[2] * 2)
    check(anew=True)


class Scaled:
    """Numbers in every place where a function can read one."""

    scale = 2.0

    def __init__(self) -> None:
        self.own, self.first, self.second = Listed(), [1.0, 2.0], [3.0]
        self.own.scale = 2.0
        self.shared, self.numbers = types.ModuleType("shared"), array("d", [2.0])
        self.shared.inner = types.ModuleType("inner")  # type: ignore[attr-defined]
        self.shared.inner.scale = 2.0  # type: ignore[attr-defined]
        self.root = [complex(-1.0, 0.0)]
        self.far = weakref.ref(self.own)

    @property
    def computed(self) -> float:
        return FACTOR

    @staticmethod
    def multiplied(x: Tensor) -> Tensor:
        return x * FACTOR

    def __call__(self, x: Tensor) -> Tensor:
        numbers = [self.scale, self.own.scale, self.computed, self.numbers[0], Inherited.scale]
        numbers += [self.shared.inner.scale, self.far().scale]  # type: ignore[union-attr, list-item]
        y = sum((x - n) ** (i + 2) for i, n in enumerate(numbers))
        y = y + sum(self.first) * x + sum(self.second) * x**3 + self.multiplied(x)
        return (y * torch.sqrt(torch.tensor(self.root[0])).imag).sum()


class Listed(list[float]):
    scale = 1.0


class Inherited(Scaled):
    pass


FACTOR = 2.0


@pytest.mark.parametrize(
    "change",
    [
        lambda f, patch: patch.setattr(Scaled, "scale", 3.0),
        lambda f, patch: patch.setattr(Scaled, "multiplied", staticmethod(lambda x: x * 7)),
        lambda f, patch: patch.setitem(globals(), "FACTOR", 3.0),
        lambda f, patch: setattr(f.own, "scale", 3.0),
        lambda f, patch: setattr(f.shared.inner, "scale", 3.0),
        lambda f, patch: f.second.insert(0, f.first.pop()),
        lambda f, patch: f.numbers.__setitem__(0, 3.0),
        lambda f, patch: f.root.__setitem__(0, complex(-1.0, -0.0)),
    ],
    ids=[
        "class attribute",
        "static method",
        "global",
        "attribute of a list",
        "module in a module",
        "from list to list",
        "array",
        "sign of zero",
    ],
)
def test_every_number_that_a_function_reads_counts(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, x = Scaled(), torch.randn(3, dtype=DOUBLE, requires_grad=True)
    fast = traced(function)
    assert_same(fast, function, (x,), (x,))
    change(function, monkeypatch)
    assert_same(fast, function, (x,), (x,))


def test_every_property_of_an_argument_counts() -> None:
    p, q = (torch.randn(2, 3, dtype=DOUBLE, requires_grad=True) for _ in range(2))

    def function(trees: dict[str, Tensor]) -> Tensor:
        y = sum(x**2 * i for i, x in enumerate(trees.values()))
        assert isinstance(y, Tensor)
        return y.sum() if y.is_contiguous() else (y**2).sum()

    fast = traced(function)
    for trees in ({"a": p, "b": q}, {"b": p, "a": q}, {"a": p.t(), "b": q.t()}):
        assert_same(fast, function, (trees,), (p, q))


def test_a_hook_of_all_modules_counts() -> None:
    model = Potential()
    fast, (x, _) = traced(model), data()
    assert_same(fast, model, (x,), list(model.parameters()))
    hook = nn.modules.module.register_module_forward_hook(lambda *_: _[2] * 2)
    try:
        assert_same(fast, model, (x,), list(model.parameters()))
    finally:
        hook.remove()


def penalty(model: nn.Module, x: Tensor, at: Sequence[Tensor]) -> Tensor:
    given = torch.autograd.grad(
        model(x).tanh().sum(), at, create_graph=True, allow_unused=True, materialize_grads=True
    )
    total = sum((g**2).sum() for g in given)
    assert isinstance(total, Tensor)
    return total


def test_parameters_passed_beside_their_module() -> None:
    model = nn.Linear(3, 3).double()
    x, at = torch.randn(3, dtype=DOUBLE, requires_grad=True), list(model.parameters())
    fast = traced(penalty)
    assert_same(fast, penalty, (model, x, at), [x, *at])
    with pytest.raises(NotTraceableError, match="computed from another"):
        fast(model, model(x), at)
    recurrent = traced(lambda model, x: model(x))  # no derivative by what it holds
    assert_same(
        lambda x: recurrent(model, recurrent(model, x)), lambda x: model(model(x)), (x,), [x, *at]
    )


def test_captured_tensors_may_also_be_arguments() -> None:
    w, model = nn.Parameter(torch.ones(3, dtype=DOUBLE)), nn.Linear(3, 3).double()
    model.plain = torch.ones(3, dtype=DOUBLE)
    for function, args in (
        (lambda: (w * 2).sin().sum(), ()),
        (lambda w: w.sin().sum(), (w,)),
        (lambda v: (w * v).sin(), (w,)),
        (lambda model, v: model(v) * model.plain, (model, model.bias)),
    ):
        assert_same(traced(function), function, args, (w, *model.parameters()))
    with torch.no_grad():
        assert_same(traced(model), model, (w,), ())


def test_a_result_that_was_changed_is_no_longer_differentiated() -> None:
    x = torch.randn(3, dtype=DOUBLE, requires_grad=True)
    y = traced(torch.exp)(x)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_another_shape_is_traced_again_and_logged(caplog: Any) -> None:
    model = Potential()
    fast = traced(force_loss)
    fast(model, *data())
    with caplog.at_level(logging.INFO, "torchopt.diff.explicit.trace"):
        fast(model, *data())
        assert not caplog.records
        fast(model, *data(5))
        fast(model.float(), *(x.float() for x in data(5)))
    assert ["force_loss with its gradient" in r.message for r in caplog.records] == [True, True]
    assert programs().kept <= 64


def test_numbers_and_arrays_among_the_arguments() -> None:
    def function(z: Tensor, weights: Any, factor: float = 1.0) -> Tensor:
        return (z**2 * torch.as_tensor(weights)).sum() * factor

    z = torch.randn(2000, dtype=DOUBLE, requires_grad=True)
    fast, weights = traced(function), torch.arange(2000.0, dtype=DOUBLE).numpy()
    for factor in (1.0, 2.0, 0.0, -0.0):
        assert_same(fast, function, (z, weights, factor), (z,))
        weights[1000] += 1  # a difference that `repr` does not show


def test_buffers_are_written_once_per_call() -> None:
    models = [Potential(nn.BatchNorm1d(5))]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        function = traced(force_loss) if model is models[0] else force_loss
        for count in (4, 5):
            torch.autograd.grad(function(model, *data(count)), list(model.parameters())[:2])
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-12, atol=0)
    assert models[0].middle.num_batches_tracked == 2


def test_an_ordinary_optimizer_trains() -> None:
    models = [Potential()]
    models.append(copy.deepcopy(models[0]))
    for model in models:
        function = traced(force_loss) if model is models[0] else force_loss
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            function(model, *data()).backward()
            optimizer.step()
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=1e-10, atol=0)


def test_modes_of_the_caller() -> None:
    model, x = Potential(), data()[0]
    fast = traced(model)
    with torch.no_grad():
        assert [y.requires_grad for y in fast(x)] == [y.requires_grad for y in model(x)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.float()(x.float())
        found = fast(x.float())
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.inference_mode():
        assert traced(lambda x: (x**2).sum())(x) == (x**2).sum()


def branches(z: Tensor) -> Tensor:
    return z.sum() if z.sum() > 0 else (z**2).sum()


def masks(z: Tensor) -> Tensor:
    return (z[z > 0] ** 2).mean()


def leaves_torch(z: Tensor) -> Tensor:
    return (z**2).sum() * float(z.detach().numpy()[0])


def lists(z: Tensor) -> Tensor:
    return (z**2).sum() * z.tolist()[0]


def counts(z: Tensor) -> Tensor:
    CALLS.append(1)
    return (z**2).sum()


def writes(z: Tensor) -> Tensor:
    z.detach().add_(1)
    return (z**2).sum()


def holds(z: Tensor) -> Tensor:
    return (z * HELD).sum()


CALLS: list[int] = []
LEAF = torch.ones(3, dtype=DOUBLE, requires_grad=True)
HELD = LEAF * 2


NUMBERS = itertools.count(1)
LAST: dict[str, Tensor] = {}


def keeps(z: Tensor) -> Tensor:
    LAST["z"] = z * 2
    return z.sum()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (branches, "in branches"),
        (masks, "in masks.*index"),
        (leaves_torch, "in leaves_torch.*numpy"),
        (lists, "in lists.*tolist"),
        (counts, "CALLS"),
        (writes, "changes an argument"),
        (lambda z: (z * next(NUMBERS)).sum(), "changes NUMBERS"),
        (keeps, "changes LAST"),
        (holds, "HELD, which was computed"),
    ],
)
def test_operations_that_cannot_be_traced_are_named(function: Any, said: str) -> None:
    z = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(NotTraceableError, match=said) as error:
        traced(function)(z)
    assert "second_order.compile: expected" in str(error.value)
    assert len(str(error.value)) < 400


def test_calls_that_are_refused() -> None:
    z = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    fast = traced(lambda *x: sum((y**3).sum() for y in x))
    with pytest.raises(NotTraceableError, match="create_graph=False"):
        torch.autograd.grad(fast(z), z, create_graph=True)
    with pytest.raises(NotTraceableError, match="outside of torch.func"):
        torch.func.grad(fast)(z)
    with pytest.raises(NotTraceableError, match="computed from each other"):
        fast(z, z * 2)
    with pytest.raises(TypeError, match="returns tensors, got float"):
        traced(lambda z: 3.0)(z)
    with pytest.raises(TypeError, match="function"):
        compile_second_order(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="execute"):
        compile_second_order(branches, execute="fast")


@pytest.mark.slow
def test_the_compiled_program_is_exact() -> None:
    model = Potential(nn.Dropout(0.5))

    def function(model: Any, x: Tensor, wanted: Tensor) -> Any:
        energy, force = model(x)
        return ((force - wanted) ** 2).mean(), energy

    fast = torchopt.second_order.compile(function)
    for count in (1, 2):
        assert_same(fast, function, (model, *data()), list(model.parameters()))
        with torch.no_grad():
            model.first.weight.mul_(count)


def test_a_missing_compiler_is_reported() -> None:
    import torch._inductor.config as config

    z = torch.ones(7, dtype=DOUBLE, requires_grad=True)
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(CompilerError, match=r"C\+\+ compiler.*trace"),
    ):
        torchopt.second_order.compile(lambda z: (z**5).sum() * 1.25)(z)


def test_a_call_is_freed_with_its_results() -> None:
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.exp()
        return y, y.sin()

    fast = torchopt.second_order.compile(both, execute="trace")
    x = torch.ones(1000, requires_grad=True)
    fast(x)
    gc.collect()
    gc.disable()  # a cycle would stay
    try:
        result = fast(x)
        alive = [weakref.ref(y) for y in result]
        del result
        assert [y() for y in alive] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("tasks", [None, 2])
@pytest.mark.parametrize("optimizer", [torchopt.sgd, torchopt.adam])
def test_a_loop_and_its_outer_loss_are_one_program(optimizer: Any, tasks: int | None) -> None:
    many = () if tasks is None else (tasks,)
    loop = torchopt.inner_loop(
        lambda w, x, scale: ((x @ w).tanh() * scale - 1).square().mean(),
        optimizer,
        steps=3,
        tasks=None if tasks is None else (None, 0, None),
    )

    def outer(w: Tensor, x: Tensor, scale: Tensor, lr: Tensor) -> Tensor:
        return (loop(w, x, scale, lr=lr).params ** 2).sum()

    generator = torch.Generator().manual_seed(0)
    fast = traced(outer)
    for _ in range(2):
        w, x, scale = (
            torch.rand(sizes, dtype=DOUBLE, generator=generator)
            for sizes in ((4, 3), (*many, 5, 4), ())
        )
        at = [w.requires_grad_(), x.requires_grad_(), scale.requires_grad_()]
        at.append(torch.tensor(0.1, dtype=DOUBLE, requires_grad=True))
        before = programs().traced
        assert_same(fast, outer, at, at)
    assert programs().traced == before
