# SPDX-License-Identifier: Apache-2.0
"""The start of a traced run is traced too, where it can be; its gradient is that of the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.base import GradientTransformation


def of_values(x: Tensor, lr: Any) -> Tensor:
    """Return a rate that depends on the initial parameters and on the rate that is given."""
    return lr / (1 + x.square().sum())


def by_branch(x: Tensor, lr: Any) -> Tensor:
    """Return one that cannot be traced."""
    return lr * x.square().sum() if bool(x.sum() > 0) else lr * x.sum()


def by_chance(x: Tensor, lr: Any) -> Tensor:
    """Return one that is drawn."""
    return lr * torch.rand_like(x)


STARTS = [of_values, by_branch, by_chance]


class Count:
    """Counts calls, and is no part of what a program depends on."""

    not_searched = True

    def __init__(self) -> None:
        self.calls = 0


def own(made: Any, count: Count | None = None) -> Any:
    """Return the constructor of an optimizer that makes its rates when it starts."""

    counted = count or Count()

    def constructor(lr: Any) -> GradientTransformation:
        def init(params: Any) -> Any:
            counted.calls += 1
            return {k: made(x, lr) for k, x in params.items()}

        def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = True) -> Any:
            return {k: -state[k] * g for k, g in updates.items()}, state

        return GradientTransformation(init, update)

    return constructor


def loss(params: dict[str, Tensor], batch: Tensor) -> Tensor:
    return (params["w"] @ batch + params["b"]).square().sum() + params["b"].pow(4).sum()


def gradients(optimizer: Any, execute: str, tasks: int | None, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    w, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    params = {"w": w.requires_grad_(), "b": b.requires_grad_()}
    shape = (4,) if tasks is None else (tasks, 4)
    batch = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    lr = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    dims = None if tasks is None else (None, 0)
    inner = torchopt.inner_loop(loss, optimizer, steps=3, tasks=dims, execute=execute, **options)
    torch.manual_seed(1)
    result = inner(params, batch, lr=lr)
    total = sum(x.square().sum() for x in result.params.values()) + result.losses.sum()
    return [*torch.autograd.grad(total, [w, b, batch, lr])]


@pytest.mark.parametrize("keep", ["all", "steps"])
@pytest.mark.parametrize("made", STARTS)
def test_the_gradient_flows_through_the_start(made: Any, keep: str) -> None:
    expected = gradients(own(made), "eager", None)
    got = gradients(own(made), "trace", None, keep=keep)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


def test_the_gradient_flows_through_the_start_of_each_task() -> None:
    expected = gradients(own(of_values), "eager", 5)
    got = gradients(own(of_values), "trace", 5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("made", "again"), [(of_values, 0), (by_branch, 2), (by_chance, 2)])
def test_a_start_is_made_again_only_where_it_depends_on_more_than_its_arguments(
    made: Any, again: int
) -> None:
    count = Count()
    lr = torch.tensor(0.01, dtype=torch.float64)
    optimizer = own(made, count)(lr)  # a transformation
    for number in range(3):
        begin = count.calls
        w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        params = {"w": w, "b": torch.ones(3, dtype=torch.float64)}
        inner = torchopt.inner_loop(loss, optimizer, steps=2, execute="trace")
        result = inner(params, torch.ones(4, dtype=torch.float64))
        (found,) = torch.autograd.grad(result.params["w"].sum(), w)
        assert found.abs().sum() > 0
        if number:
            assert count.calls - begin == again


def test_a_start_follows_the_tensors_that_the_optimizer_holds() -> None:
    lr = torch.tensor(0.01, dtype=torch.float64)
    found = []
    for value in (0.01, 0.02):
        lr.fill_(value)
        for execute in ("trace", "eager"):
            inner = torchopt.inner_loop(loss, own(of_values)(lr), steps=2, execute=execute)
            params = {k: torch.ones(n, dtype=torch.float64) for k, n in (("w", (3, 4)), ("b", 3))}
            found.append(inner(params, torch.ones(4, dtype=torch.float64)).params["w"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(found[2], found[3], rtol=1e-12, atol=0)
    assert (found[0] - found[2]).abs().max() > 1e-4


def form(**changes: Any) -> dict[str, Any]:
    """Return the options of a call, with some of them changed."""
    return {"factor": 2.0, "swapped": False, "dim": 0, "lr": 0.1, "held": (), "unroll": 1} | changes


@pytest.mark.parametrize(
    "other",
    [
        form(factor=3.0),
        form(factor=3),
        form(swapped=True),
        form(dim=1),
        form(lr=0.2),
        form(held=("x",)),
        form(held=("a", "b")),
        form(unroll=2),
    ],
    ids=str,
)
def test_calls_that_differ_in_one_thing_share_nothing_that_depends_on_it(
    other: dict[str, Any],
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    x = torch.randn(3, 3, dtype=torch.float64, generator=generator)

    def loss(params: dict[str, Tensor], batch: list[Any]) -> Tensor:
        first, second = params.values()  # in the order of the dict
        return ((first.sin() * batch[0] + second.cos()) ** 2).sum() * batch[1]

    def gradients(options: dict[str, Any], execute: str) -> list[Tensor]:
        leaves = {
            k: v.clone().requires_grad_(k not in options["held"])
            for k, v in {"a": a, "b": b, "x": x}.items()
        }
        names = ("b", "a") if options["swapped"] else ("a", "b")
        inner = torchopt.inner_loop(
            loss,
            torchopt.sgd(options["lr"], momentum=0.5),
            steps=4,
            tasks=(None, [options["dim"], None]),
            execute=execute,
            unroll=options["unroll"] if execute == "trace" else 1,
        )
        found = inner({k: leaves[k] for k in names}, [leaves["x"], options["factor"]])
        wanted = [v for v in leaves.values() if v.requires_grad]
        end = sum((v**3).sum() for v in found.params.values())
        return list(torch.autograd.grad(end, wanted))

    for options in (form(), other, form()):
        expected = gradients(options, "eager")
        torch.testing.assert_close(gradients(options, "trace"), expected, rtol=1e-12, atol=1e-12)


def in_proportion(x: Tensor, lr: Any) -> Tensor:
    """Return one whose derivative is the rate that is given."""
    return lr * x


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("made", [in_proportion, of_values, by_branch])
def test_a_tensor_of_the_start_that_changes_before_the_backward_pass_changes_no_gradient(
    made: Any, calls: int, second: bool
) -> None:
    rate = torch.tensor(0.1, dtype=torch.float64)
    optimizer = own(made)(rate)
    generator = torch.Generator().manual_seed(0)
    w, b, x = torch.rand(3, 2, dtype=torch.float64, generator=generator).requires_grad_()

    def end(execute: str) -> Tensor:
        inner = torchopt.inner_loop(loss, optimizer, steps=3, execute=execute)
        ends = [inner({"w": w, "b": b}, x).params["w"].sum() for _ in range(calls)]
        return ends[-1]

    (expected,) = torch.autograd.grad(end("eager"), w)
    total = end("trace")
    if second:
        torch.autograd.grad(total, w, retain_graph=True)
    rate.mul_(10.0)
    if made is of_values and not (calls == 2 and second):  # the run has computed all of it
        (found,) = torch.autograd.grad(total, w)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    else:
        with pytest.raises(RuntimeError, match="changed in place"):
            torch.autograd.grad(total, w)
