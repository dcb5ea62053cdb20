# SPDX-License-Identifier: Apache-2.0
"""Leaves joined into one vector give the estimates of leaves one by one, in fewer operations."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchopt.diff.zero_order import (
    FromDistribution,
    Gaussian,
    Guided,
    Orthogonal,
    Rademacher,
    Sobol,
    Sphere,
    ZeroOrder,
    zero_order,
)
from torchopt.diff.zero_order.estimators import ESTIMATORS, antithetic, multi_point, shaped
from torchopt.diff.zero_order.form import Form

F64 = torch.float64
SHAPES = ((3,), (), (2, 2), (0, 2), (1, 1, 2))
D = 10


def normal(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def point(dtype: torch.dtype = F64) -> dict[str, Tensor]:
    return {f"p{k}": normal(*s, seed=k, dtype=dtype) for k, s in enumerate(SHAPES)}


def smooth(p: dict[str, Tensor]) -> Tensor:
    vector = torch.cat([p[name].flatten() for name in sorted(p)])
    return torch.sin(vector).prod() + (vector**3).sum() + torch.rand((), dtype=vector.dtype)


SOURCES: dict[str, Any] = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "sphere": Sphere(),
    "orthogonal": Orthogonal(4),
    "sobol": Sobol(8),
    "guided": Guided(normal(D, 2, seed=9), 0.5),
    "laplace": torch.distributions.Laplace(0.0, 0.5**0.5),
    "a function": FromDistribution(lambda shape: torch.randn(shape, dtype=F64)),
}
METHODS: dict[str, Any] = {
    **{name: name for name in ESTIMATORS},
    "four points": multi_point(2),
    "ranks": shaped(antithetic),
}


@pytest.fixture
def separate(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after which no leaves are joined."""
    return lambda: monkeypatch.setattr("torchopt.diff.zero_order.form.is_flat", lambda like: False)


def joins(engine: ZeroOrder, leaves: list[Tensor]) -> bool:
    return Form(leaves, engine.directions, engine.estimator).joined


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", SOURCES)
def test_joined_leaves_have_the_estimate_of_separate_ones(
    source: str, method: str, separate: Callable[[], None]
) -> None:
    options: dict[str, Any] = {"num_samples": 24, "sigma": 0.1, "chunk_size": 16}
    engine = ZeroOrder(SOURCES[source], METHODS[method], **options)
    assert joins(engine, list(point().values())) == (source != "a function")
    surrogate = {k: torch.ones_like(x) for k, x in point().items()}
    known = source not in ("sphere", "a function") and METHODS[method] is not METHODS["ranks"]
    hint = surrogate if known and method != "spsa" else None

    def results() -> Iterator[Any]:
        yield engine.estimate(smooth, point(), seed=3)
        yield engine.estimate(smooth, point(), seed=3, surrogate=hint)
        losses = engine.losses(smooth, point(), seed=3)
        center = engine.center(smooth, point(), seed=3)
        yield losses
        yield engine.combine(losses, point(), seed=3, center=center)

    joined = list(results())
    separate()
    assert not joins(engine, list(point().values()))
    # Sums of 24 terms of size 1 / sigma, in two orders.
    torch.testing.assert_close(joined, list(results()), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_joined_leaves_of_every_dtype(dtype: torch.dtype, separate: Callable[[], None]) -> None:
    engine = ZeroOrder(Gaussian(), "antithetic", num_samples=8, sigma=0.5)
    p = {k: x for k, x in point(dtype).items() if x.numel()}

    def f(p: dict[str, Tensor]) -> Tensor:
        return sum((x.abs().float() ** 2).sum() for x in p.values())  # type: ignore[return-value]

    joined = engine.estimate(f, p, seed=3)
    assert all(joined.gradient[k].dtype == x.dtype for k, x in p.items())
    separate()
    # The points are the same numbers; sums are float32 and rounded once.
    torch.testing.assert_close(joined, engine.estimate(f, p, seed=3))


def test_second_derivatives_of_joined_leaves(separate: Callable[[], None]) -> None:
    def products() -> list[Tensor]:
        draw = torch.Generator().manual_seed(5)
        engine = ZeroOrder(
            Gaussian(), "antithetic", (0, 1), num_samples=30, sigma=0.1, generator=draw
        )
        f = engine(lambda x, y: smooth({"a": x, "b": y}))
        torch.manual_seed(0)
        x = [normal(3, seed=1).requires_grad_(), normal(2, 2, seed=2).requires_grad_()]
        first = torch.autograd.grad(f(*x), x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        return [*first, *second]

    joined = products()
    separate()
    torch.testing.assert_close(joined, products(), rtol=1e-10, atol=1e-10)


def test_gradients_have_their_own_memory() -> None:
    x = {k: v.requires_grad_() for k, v in point().items() if v.numel()}
    zero_order(Gaussian(), "antithetic", num_samples=3)(smooth)(x).backward()
    for v in x.values():
        assert v.grad is not None
        assert v.grad.untyped_storage().nbytes() == v.numel() * v.element_size()
    found = ZeroOrder(Gaussian(), "antithetic", num_samples=3).estimate(smooth, x, seed=0)
    for tree in (found.gradient, found.standard_error):
        assert len({v.untyped_storage().data_ptr() for v in tree.values()}) == len(tree)


class Scaled(Gaussian):
    """A source of a subclass that looks at the leaves: each has a scale of its own."""

    def draw(self, like: Any, seed: int, start: int, stop: int) -> list[Tensor]:
        scales = (0.0, 1.0)
        return [s * z for s, z in zip(scales, super().draw(like, seed, start, stop), strict=True)]


def test_sources_and_duals_of_the_user_get_the_leaves() -> None:
    x, y = torch.ones(2, dtype=F64), torch.ones(3, dtype=F64)
    engine = ZeroOrder(Scaled(), "antithetic", (0, 1), num_samples=50)
    first, second = engine.estimate(lambda x, y: x.sum() + y.sum(), x, y, seed=0).gradient
    assert not first.any()
    assert second.all()
    shapes = []

    def dual(z: Tensor) -> Tensor:
        shapes.append(z.shape[1:])
        return z

    estimator = dataclasses.replace(antithetic, dual=dual)
    engine = ZeroOrder(Gaussian(), estimator, (0, 1), num_samples=5)
    engine.estimate(lambda x, y: x.sum() + y.sum(), x, y, seed=0)
    assert shapes == [x.shape, y.shape]


def test_leaves_of_several_dtypes_and_large_ones_are_not_joined() -> None:
    engine = ZeroOrder(Gaussian())
    one = torch.zeros(2)
    assert joins(engine, [one, one])
    assert not joins(engine, [one])
    assert not joins(engine, [one, one.double()])
    assert not joins(engine, [one, one.to("meta")])
    assert not joins(engine, [one, torch.zeros(2**17)])


def test_points_are_contiguous_and_do_not_share_memory_between_leaves() -> None:
    seen = []

    def f(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x.is_contiguous() and y.is_contiguous())
        assert x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr()
        return x.sum() + y.sum()

    engine = ZeroOrder(Gaussian(), "antithetic", (0, 1), num_samples=3, vectorized=False)
    engine.estimate(f, normal(2, 3, seed=1).mT, normal(2, 2, seed=2), seed=0)
    assert seen == [True] * 6


@pytest.mark.parametrize("vectorized", [True, False])
def test_one_leaf_is_overwritten_while_a_graph_needs_another(vectorized: bool) -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        w = torch.ones(2, dtype=F64, requires_grad=True)
        with torch.enable_grad():
            value = (w * x).sum()  # saves x
        y.zero_()
        (g,) = torch.autograd.grad(value, w)
        return (g * x).sum() + y.sum()

    x, y = normal(2, seed=1), normal(3, seed=2)
    engine = ZeroOrder(Rademacher(), "antithetic", (0, 1), num_samples=4, vectorized=vectorized)
    if vectorized:
        return _without_graph(engine, x, y)
    found = engine.estimate(f, x, y, seed=0)
    expected = engine.estimate(lambda x, y: (x * x).sum(), x, y, seed=0)
    torch.testing.assert_close(found, expected)
    return None


def _without_graph(engine: ZeroOrder, x: Tensor, y: Tensor) -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        def inner(w: Tensor) -> Tensor:
            return (w * w * x).sum()

        value = torch.func.grad(inner)(x)
        y.zero_()
        return (value * x).sum() + y.sum()

    found = engine.estimate(f, x, y, seed=0)
    expected = engine.estimate(lambda x, y: (2 * x * x * x).sum(), x, y, seed=0)
    torch.testing.assert_close(found, expected)


def test_a_loop_after_vmap_has_failed_starts_from_the_points() -> None:
    """A function may overwrite its arguments before it does what vmap cannot."""

    def f(x: Tensor) -> Tensor:
        x.mul_(2)
        return x.sum() if x.sum().item() > -1e9 else -x.sum()

    x = torch.tensor([3.0, 1.0], dtype=F64)
    for count in (1, 2):
        args = (x,) * count
        with pytest.warns(UserWarning, match="vmap cannot take this function"):
            found = ZeroOrder(
                Rademacher(), "antithetic", tuple(range(count)), num_samples=4
            ).losses(lambda *given: sum(map(f, given)), *args, seed=0)
        expected = ZeroOrder(Rademacher(), "antithetic", tuple(range(count)), num_samples=4).losses(
            lambda *given: sum(2 * g.sum() for g in given), *args, seed=0
        )
        torch.testing.assert_close(found, expected)


# --- one decorated function in many surroundings --------------------------------------------------


def cube(p: dict[str, Tensor], shift: Tensor) -> Tensor:
    return sum(((x + shift) ** 3).sum() for x in p.values())  # type: ignore[return-value]


def cases() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    def tree(*shapes: tuple[int, ...], dtype: torch.dtype = F64, grad: bool = True) -> Any:
        return {
            str(k): normal(*s, seed=k, dtype=dtype).requires_grad_(grad)
            for k, s in enumerate(shapes)
        }

    shift = torch.tensor(0.5, dtype=F64)
    return {
        "two leaves": (tree((3,), (2, 2)), shift),
        "another shape": (tree((2, 2), (3,)), shift),
        "as many entries in other leaves": (tree((2, 2), (2,), ()), shift),
        "float32": (tree((3,), (2, 2), dtype=torch.float32), shift.float()),
        "bfloat16": (tree((3,), (2, 2), dtype=torch.bfloat16), shift.bfloat16()),
        "complex": ({"0": normal(3, seed=1), "1": normal(2, seed=2).to(torch.complex128)}, shift),
        "two dtypes": (tree((3,)) | {"1": normal(2, seed=2, dtype=torch.float32)}, shift),
        "one leaf": (tree((7,)), shift),
        "no gradient": (tree((3,), (2, 2), grad=False), shift),
        "a transposed leaf": ({"0": normal(2, 3, seed=1).mT, "1": normal(2, seed=3)}, shift),
    }


def answer(f: Callable[..., Tensor], tree: dict[str, Tensor], shift: Tensor) -> list[Tensor]:
    """Return the value and the estimate of a call with seed 7."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in tree.values()]
    torch.manual_seed(7)
    value = f(dict(zip(tree, leaves)), shift)
    wanted = [x for x in leaves if x.requires_grad]
    found = torch.autograd.grad(value, wanted) if wanted else []
    return [value.detach(), *found]


def real(p: dict[str, Tensor], shift: Tensor) -> Tensor:
    return cube({k: torch.view_as_real(x) if x.is_complex() else x for k, x in p.items()}, shift)


def test_a_call_does_not_depend_on_the_calls_before() -> None:
    """Of other structure, shape, dtype, layout, requires_grad, grad mode, autocast, transform."""
    options: dict[str, Any] = {"num_samples": 6, "sigma": 0.25}

    def fresh() -> Callable[..., Tensor]:
        return zero_order(Gaussian(), "antithetic", **options)(real)

    shared, given = fresh(), cases()
    order = [*given, *reversed(given)]
    for name in order:
        torch.testing.assert_close(
            answer(shared, *given[name]), answer(fresh(), *given[name]), rtol=0, atol=0
        )
        for surroundings in (
            torch.no_grad(),
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            with surroundings:
                tree, shift = given[name]
                plain = {k: x.detach() for k, x in tree.items()}
                if not isinstance(surroundings, torch.autocast):
                    assert not shared(plain, shift).requires_grad
                    continue
                torch.testing.assert_close(
                    answer(shared, tree, shift), answer(fresh(), tree, shift), rtol=0, atol=0
                )
    tree, shift = given["two leaves"]
    rows = {k: torch.stack([x.detach(), 2 * x.detach()]) for k, x in tree.items()}

    def batched(f: Callable[..., Tensor]) -> Any:
        torch.manual_seed(7)
        return torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(rows, shift)

    torch.testing.assert_close(batched(shared), batched(fresh()), rtol=0, atol=0)


def test_a_call_sees_what_the_closure_holds_now() -> None:
    factor = torch.ones((), dtype=F64)
    holder = {"f": lambda x: x.sum()}
    f = zero_order(Rademacher(), "antithetic", (0, 1), num_samples=400)(
        lambda x, y: factor * holder["f"](x) + y.sum()
    )
    x, y = normal(3, seed=1).requires_grad_(), normal(2, seed=2).requires_grad_()
    one = torch.ones(3, dtype=F64)
    for scale, function, slope in (
        (1.0, lambda x: x.sum(), one),
        (3.0, lambda x: x.sum(), 3 * one),
        (3.0, lambda x: -x.sum(), -3 * one),
    ):
        factor.fill_(scale)
        holder["f"] = function
        (g,) = torch.autograd.grad(f(x, y), [x])
        # Signs z: the variance of an entry of the mean of (g'z) z is (norm(g)^2 - g_i^2) / N.
        error = ((3 * scale**2 + 2 - scale**2) / 400) ** 0.5
        assert ((g - slope).abs() < 5 * error).all()


def test_threads_share_a_decorated_function() -> None:
    options: dict[str, Any] = {"num_samples": 6, "sigma": 0.25}
    given, found = cases(), {}
    shared = zero_order(Rademacher(), "antithetic", **options)(real)
    names = ["two leaves", "another shape", "one leaf", "two dtypes"]

    def work(name: str) -> None:
        tree, shift = given[name]
        leaves = {k: x.detach().clone().requires_grad_() for k, x in tree.items()}
        for _ in range(5):
            value = shared(leaves, shift)
            grads = torch.autograd.grad(value, list(leaves.values()))
        found[name] = ([x.shape for x in grads], [x.dtype for x in grads], value.detach())

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in names:
        tree, shift = given[name]
        shapes, dtypes, value = found[name]
        assert shapes == [x.shape for x in tree.values()]
        assert dtypes == [x.dtype for x in tree.values()]
        torch.testing.assert_close(value, real(tree, shift).detach())


# --- the number of operations ---------------------------------------------------------------------


class Count(TorchDispatchMode):
    """Counts operations, without those that only make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(leaves: int) -> int:
    """Return the operations of a decorated function of some leaves and its backward pass."""
    tree = [torch.ones(4, 5, requires_grad=True) for _ in range(leaves)]
    f = zero_order(Gaussian(), "antithetic", num_samples=10, sigma=0.1)(lambda p: p[0].sum())
    with Count() as counted:
        torch.autograd.grad(f(tree), tree)
    return counted.count


def test_a_leaf_takes_two_copies_and_its_largest_entry() -> None:
    """Of the point, of the gradient, and for the warning of lost perturbations."""
    few, many = operations(2), operations(42)
    assert many - few <= 40 * 5
    assert few < 60
