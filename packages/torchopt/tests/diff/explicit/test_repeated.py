# SPDX-License-Identifier: Apache-2.0
"""A call that repeats an earlier one has the values and gradients of its own arguments."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from unrolled_loops import loss_of, outer, problem, worst

import torchopt
from torchopt.diff.explicit.loop import Explicit
from torchopt.errors import NotTraceableError

STEPS = 4
OPTIMIZERS: dict[str, tuple[Any, dict[str, float]]] = {
    "sgd": (torchopt.sgd, {"lr": 0.1}),
    "momentum": (torchopt.sgd, {"lr": 0.1, "momentum": 0.9}),
    "adam": (torchopt.adam, {"lr": 0.05, "eps": 0.1}),
}


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that returns how many calls were not repetitions."""
    calls: list[None] = []
    plain = Explicit._call

    def counted(self: Explicit, *args: Any) -> Any:
        calls.append(None)
        return plain(self, *args)

    monkeypatch.setattr(Explicit, "_call", counted)
    return lambda: len(calls)


def arguments(number: int, tasks: int | None = None, *, unused: bool = False) -> list[Any]:
    """Return parameters, batch and further argument, other values for each number."""
    params, batch, scale = problem(tasks)
    if not unused:
        del params["unused"]
    factor = 1 + number / 7
    moved = {k: (x * factor + number / 5).detach().requires_grad_() for k, x in params.items()}
    of_batch = tuple((x * factor).detach().requires_grad_() for x in batch)
    return [moved, of_batch, (scale + number).detach().requires_grad_()]


def gradients(inner: Any, given: list[Any], hypers: dict[str, Any], *, losses: bool = False) -> Any:
    """Return the gradients of the end, or of the losses too, and what they belong to."""
    result = inner(*given, **hypers)
    total = outer(result.params, result.losses if losses else torch.ones(()), result.state)
    inputs = [*given[0].values(), *given[1], given[2], *hypers.values()]
    inputs = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return torch.autograd.grad(total, inputs, allow_unused=True), inputs


def numbers(values: dict[str, float]) -> dict[str, Any]:
    return {k: torch.tensor(x, dtype=torch.float64, requires_grad=True) for k, x in values.items()}


def both(optimizer: Any, execute: str = "trace", **options: Any) -> tuple[Any, Any]:
    """Return a traced loop and an eager one."""
    unroll = options.pop("unroll", 1)
    fast = torchopt.inner_loop(
        loss_of, optimizer, steps=STEPS, execute=execute, unroll=unroll, **options
    )
    return fast, torchopt.inner_loop(loss_of, optimizer, steps=STEPS, **options)


def assert_same(fast: Any, slow: Any, given: Any, hypers: Any, **options: Any) -> None:
    got, inputs = gradients(fast, given, hypers, **options)
    expected, _ = gradients(slow, given, hypers, **options)
    assert worst(expected, got, inputs) < 1e-12
    assert max(float(g.abs().max()) for g in expected if g is not None) > 1e-3


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_repetitions_have_the_gradients_of_their_own_arguments(
    case: str, tasks: int | None, unroll: int, count: Callable[[], int]
) -> None:
    optimizer, values = OPTIMIZERS[case]
    dims = None if tasks is None else (None, 0, None)
    fast, slow = both(optimizer, tasks=dims, unroll=unroll)
    hypers = numbers(values)
    for number in range(3):
        before = count()
        got, inputs = gradients(fast, arguments(number, tasks), hypers)
        assert count() - before == (number == 0)
        expected, _ = gradients(slow, arguments(number, tasks), hypers)
        assert worst(expected, got, inputs) < 1e-12


def test_a_parameter_that_the_loss_does_not_use_has_the_gradient_of_its_end(
    count: Callable[[], int],
) -> None:
    fast, slow = both(torchopt.sgd)
    hypers = numbers({"lr": 0.1, "momentum": 0.9})
    for number in range(3):
        before = count()
        got, inputs = gradients(fast, arguments(number, unused=True), hypers)
        assert count() - before == (number == 0)
        expected, _ = gradients(slow, arguments(number, unused=True), hypers)
        assert worst(expected, got, inputs) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [None, 3])
@pytest.mark.parametrize("case", ["momentum", "adam"])
def test_compiled_repetitions_have_the_gradients_of_their_own_arguments(
    case: str, tasks: int | None, count: Callable[[], int]
) -> None:
    optimizer, values = OPTIMIZERS[case]
    dims = None if tasks is None else (None, 0, None)
    fast, slow = both(optimizer, "compile", tasks=dims)
    hypers = numbers(values)
    for number in range(3):
        before = count()
        got, inputs = gradients(fast, arguments(number, tasks), hypers)
        assert count() - before == (number == 0)
        expected, _ = gradients(slow, arguments(number, tasks), hypers)
        assert worst(expected, got, inputs) < 1e-12


def test_a_repetition_returns_what_the_call_returned() -> None:
    def told(params: Any, batch: Any, scale: Tensor) -> Any:
        return loss_of(params, batch, scale), {"name": "x", "none": None}

    inner = torchopt.inner_loop(told, torchopt.adam, steps=STEPS, execute="trace")
    first, second = (inner(*arguments(0), lr=0.05) for _ in range(2))
    assert torchopt.tree.tree_structure(first) == torchopt.tree.tree_structure(second)
    for x, y in zip(*(torchopt.tree.tree_leaves(x) for x in (first, second)), strict=True):
        assert type(x) is type(y)
        if isinstance(x, Tensor):
            assert x.requires_grad == y.requires_grad
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        else:
            assert x == y


def test_a_repetition_outside_of_grad_mode_has_no_graph(count: Callable[[], int]) -> None:
    fast, slow = both(torchopt.adam)
    with torch.no_grad():
        fast(*arguments(0), lr=0.05)
        before = count()
        got = fast(*arguments(1), lr=0.05)
        assert count() == before
        expected = slow(*arguments(1), lr=0.05)
    assert not got.losses.requires_grad
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(got.params["w"], expected.params["w"], rtol=1e-13, atol=0)


# Each changes the arguments of a call in a way that a program depends on.
CHANGES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "another shape": lambda given, hypers: (
        [given[0], tuple(x[:3].detach().requires_grad_() for x in given[1]), given[2]],
        hypers,
    ),
    "an order of a dict": lambda given, hypers: (
        [dict(reversed(given[0].items())), *given[1:]],
        hypers,
    ),
    "a negative view": lambda given, hypers: (
        [*given[:2], torch.complex(given[2], -given[2]).detach().conj().imag.requires_grad_()],
        hypers,
    ),
    "other strides": lambda given, hypers: (
        [
            given[0],
            (given[1][0].mT.contiguous().mT.detach().requires_grad_(), given[1][1]),
            given[2],
        ],
        hypers,
    ),
    "another number": lambda given, hypers: (given, {**hypers, "momentum": 0.3}),
    "another tensor for a number": lambda given, hypers: (
        given,
        {**hypers, "lr": torch.tensor(0.03, dtype=torch.float64, requires_grad=True)},
    ),
    "a list for a tuple": lambda given, hypers: ([given[0], [*given[1]], given[2]], hypers),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_form_is_no_repetition(change: str, count: Callable[[], int]) -> None:
    fast, slow = both(torchopt.sgd)
    hypers = {"lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True), "momentum": 0.9}
    for _ in range(2):
        assert_same(fast, slow, arguments(0), hypers)
    before = count()
    given, others = CHANGES[change](arguments(1), hypers)
    gradients(fast, given, others)
    assert count() == before + 1
    assert_same(fast, slow, given, others)
    assert_same(fast, slow, arguments(2), hypers)  # the first form again


@pytest.mark.parametrize("change", ["parameters", "one tensor twice"])
def test_tensors_of_the_same_forms_are_repeated(change: str, count: Callable[[], int]) -> None:
    fast, slow = both(torchopt.sgd)
    for _ in range(2):
        assert_same(fast, slow, arguments(0), {"lr": 0.1})
    before = count()
    params, batch, scale = arguments(1)
    if change == "parameters":
        params = {k: torch.nn.Parameter(x.detach()) for k, x in params.items()}
    else:
        scale = params["b"]
    gradients(fast, [params, batch, scale], {"lr": 0.1})
    assert count() == before
    assert_same(fast, slow, [params, batch, scale], {"lr": 0.1})


@pytest.mark.parametrize("what", ["the default dtype", "a hook of all modules", "grad mode"])
def test_settings_of_torch_are_compared(what: str, count: Callable[[], int]) -> None:
    fast, slow = both(torchopt.sgd)
    for _ in range(2):
        assert_same(fast, slow, arguments(0), {"lr": 0.1})
    before = count()
    if what == "the default dtype":
        torch.set_default_dtype(torch.float64)
        try:
            fast(*arguments(0), lr=0.1)
        finally:
            torch.set_default_dtype(torch.float32)
    elif what == "grad mode":
        with torch.no_grad():
            assert not fast(*arguments(0), lr=0.1).losses.requires_grad
    else:
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
        fast(*arguments(0), lr=0.1)
        handle.remove()
    assert count() == before + 1
    fast(*arguments(0), lr=0.1)
    assert count() == before + 1


def test_fewer_differentiated_arguments_are_another_form(count: Callable[[], int]) -> None:
    fast, slow = both(torchopt.sgd)
    for _ in range(2):
        assert_same(fast, slow, arguments(0), {"lr": 0.1})
    before = count()
    params, batch, scale = arguments(1)
    result = fast(params, tuple(x.detach() for x in batch), scale, lr=0.1)
    assert count() == before + 1
    expected = slow(params, tuple(x.detach() for x in batch), scale, lr=0.1)
    got, want = (torch.autograd.grad(r.params["w"].sum(), scale)[0] for r in (result, expected))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_a_value_that_the_loss_reads_is_compared() -> None:
    factor = {"value": 1.0}

    def scaled(params: Any, batch: Any, scale: Tensor) -> Any:
        return loss_of(params, batch, scale) * factor["value"]

    fast = torchopt.inner_loop(scaled, torchopt.sgd, steps=STEPS, execute="trace")
    slow = torchopt.inner_loop(scaled, torchopt.sgd, steps=STEPS)
    for value in (1.0, 1.0, 3.0, 3.0, 1.0):
        factor["value"] = value
        assert_same(fast, slow, arguments(1), {"lr": 0.1})


def test_the_present_value_of_a_tensor_of_the_loss_is_used() -> None:
    weight = torch.ones(3, dtype=torch.float64)

    def weighted(params: Any, batch: Any, scale: Tensor) -> Any:
        return loss_of(params, batch, scale * weight)

    fast = torchopt.inner_loop(weighted, torchopt.sgd, steps=STEPS, execute="trace")
    slow = torchopt.inner_loop(weighted, torchopt.sgd, steps=STEPS)
    assert_same(fast, slow, arguments(0), {"lr": 0.1})
    weight.mul_(2.0)
    assert_same(fast, slow, arguments(0), {"lr": 0.1})
    weight.data = torch.complex(weight, -weight).conj().imag  # the same form, other memory
    assert_same(fast, slow, arguments(0), {"lr": 0.1})


def test_the_present_value_of_a_rate_is_used(count: Callable[[], int]) -> None:
    fast, slow = both(torchopt.adam)
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert_same(fast, slow, arguments(0), {"lr": rate})
    with torch.no_grad():
        rate.mul_(3.0)
    before = count()
    gradients(fast, arguments(0), {"lr": rate})
    assert count() == before
    assert_same(fast, slow, arguments(0), {"lr": rate})
    rate.requires_grad = False
    assert_same(fast, slow, arguments(0), {"lr": rate})


def test_a_made_optimizer_is_repeated_with_its_tensors(count: Callable[[], int]) -> None:
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def made() -> Any:
        return torchopt.chain(torchopt.clip.clip_grad_norm(0.5), torchopt.adam(rate, eps=0.1))

    fast, slow = both(made())[0], both(made())[1]  # a run may fill caches of its optimizer
    for number in range(3):
        before = count()
        results = [inner(*arguments(number)) for inner in (fast, slow)]
        assert count() - before == (2 if number == 0 else 1)  # the eager loop is counted too
        got, want = (torch.autograd.grad(r.params["w"].sum(), rate)[0] for r in results)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        with torch.no_grad():
            rate.mul_(1.5)


def test_gradients_of_the_losses_are_right_and_end_the_repetitions(
    count: Callable[[], int],
) -> None:
    fast, slow = both(torchopt.adam)
    for number in range(4):
        before = count()
        got, inputs = gradients(fast, arguments(number), {"lr": 0.05}, losses=True)
        assert count() - before == (number != 1)  # the first repetition finds out
        expected, _ = gradients(slow, arguments(number), {"lr": 0.05}, losses=True)
        assert worst(expected, got, inputs) < 1e-12


def test_a_second_backward_pass_gives_the_same() -> None:
    fast, _ = both(torchopt.adam)
    fast(*arguments(0), lr=0.05)
    given = arguments(1)
    result = fast(*given, lr=0.05)
    inputs = [*given[0].values(), *given[1]]
    total = outer(result.params, torch.ones(()), result.state)
    first, second, third = (
        torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True) for _ in range(3)
    )
    assert worst(first, second, inputs) < 1e-13
    assert worst(first, third, inputs) < 1e-13


def test_a_repetition_is_not_differentiated_twice() -> None:
    fast, _ = both(torchopt.sgd)
    fast(*arguments(0), lr=0.1)
    given = arguments(1)
    result = fast(*given, lr=0.1)
    with pytest.raises(NotTraceableError, match="not differentiated again"):
        torch.autograd.grad(result.params["w"].sum(), given[0]["w"], create_graph=True)


def test_inputs_changed_before_the_backward_pass_raise() -> None:
    fast, _ = both(torchopt.sgd)
    fast(*arguments(0), lr=0.1)
    given = arguments(1)
    result = fast(*given, lr=0.1)
    with torch.no_grad():
        given[1][0].mul_(2.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace|changed in place"):
        torch.autograd.grad(result.params["w"].sum(), given[0]["w"])


def test_a_tensor_of_the_loss_changed_before_the_backward_pass_raises() -> None:
    weight = torch.ones(3, dtype=torch.float64)

    def weighted(params: Any, batch: Any, scale: Tensor) -> Any:
        return loss_of(params, batch, scale * weight)

    fast = torchopt.inner_loop(weighted, torchopt.sgd, steps=STEPS, execute="trace")
    for wanted in ("params", "losses"):
        fast(*arguments(0), lr=0.1)
        given = arguments(1)
        result = fast(*given, lr=0.1)
        weight.mul_(2.0)
        total = result.losses.sum() if wanted == "losses" else result.params["w"].sum()
        with pytest.raises(RuntimeError, match="weight, which was changed in place"):
            torch.autograd.grad(total, given[0]["w"])


@pytest.mark.parametrize("again", ["losses", "second"])
@pytest.mark.parametrize("kind", ["number", "tensor", "settings"])
def test_what_a_loss_holds_is_the_same_in_every_backward_pass(kind: str, again: str) -> None:
    held: dict[str, Any] = {"factor": 1.0, "weight": torch.ones(3, dtype=torch.float64)}

    def weighted(params: Any, batch: Any, scale: Tensor) -> Any:
        return loss_of(params, batch, scale * held["weight"]) * held["factor"]

    fast = torchopt.inner_loop(weighted, torchopt.sgd, steps=STEPS, execute="trace")
    fast(*arguments(0), lr=0.1)
    given = arguments(1)
    result = fast(*given, lr=0.1)
    total = result.losses.sum() if again == "losses" else result.params["w"].sum()
    if again == "second":
        torch.autograd.grad(total, given[0]["w"], retain_graph=True)
    if kind == "settings":
        torch.set_default_dtype(torch.float64)
    elif kind == "number":
        held["factor"] = 3.0
    else:
        held["weight"] = torch.full((3,), 2.0, dtype=torch.float64)
    try:
        with pytest.raises(RuntimeError, match=rf"{'settings' if kind == 'settings' else 'held'}"):
            torch.autograd.grad(total, given[0]["w"])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("again", ["losses", "second"])
def test_a_run_that_is_computed_again_has_the_autocast_of_the_repetition(again: str) -> None:
    def product(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).tanh().sum()

    def gradient(*, inside: bool, autocast: bool = True) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        w, x = (torch.randn(5, 5, generator=generator).requires_grad_() for _ in range(2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            fast = torchopt.inner_loop(product, torchopt.sgd, steps=STEPS, execute="trace")
            fast(w, x, lr=0.1)
            result = fast(w, x, lr=0.1)
        total = result.losses.sum() if again == "losses" else result.params.sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            if again == "second":
                torch.autograd.grad(total, x, retain_graph=True)
            return torch.autograd.grad(total, x)[0]

    expected = gradient(inside=True)
    torch.testing.assert_close(gradient(inside=False), expected, rtol=0, atol=0)
    assert float((gradient(inside=False, autocast=False) - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("again", ["losses", "second"])
def test_rates_have_their_gradients_if_hooks_copy_what_is_saved(again: str) -> None:
    def own_loss(*given: Any) -> Any:  # whose adjoint no other test has traced
        return loss_of(*given) * 1.25

    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    found = []
    for execute in ("trace", "eager"):
        inner = torchopt.inner_loop(own_loss, torchopt.adam, steps=STEPS, execute=execute)
        inner(*arguments(0), lr=rate)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
            result = inner(*arguments(1), lr=rate)
        total = result.losses.sum() if again == "losses" else result.params["w"].sum()
        if again == "second":
            torch.autograd.grad(total, rate, retain_graph=True)
        found += torch.autograd.grad(total, rate)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_tensors_that_the_loss_no_longer_holds_are_freed() -> None:
    held = {"weight": torch.ones(3, dtype=torch.float64)}

    def weighted(params: Any, batch: Any, scale: Tensor) -> Any:
        return loss_of(params, batch, scale * held["weight"])

    fast = torchopt.inner_loop(weighted, torchopt.sgd, steps=STEPS, execute="trace")
    fast(*arguments(0), lr=0.1)
    old = weakref.ref(held["weight"])
    held["weight"] = torch.full((3,), 2.0, dtype=torch.float64)
    fast(*arguments(0), lr=0.1)
    gc.collect()
    assert old() is None


def test_results_and_gradients_own_their_memory() -> None:
    fast, _ = both(torchopt.sgd, "trace")
    fast(*arguments(0), lr=0.1)
    given = arguments(1)
    before = [x.clone() for x in given[0].values()]
    result = fast(*given, lr=0.1)
    grads = torch.autograd.grad(result.params["w"].sum(), [given[0]["w"], given[2]])
    for x in (*grads, *(y.detach() for y in result.params.values())):
        x.zero_()
    for x, y in zip(given[0].values(), before):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_repetition_is_freed_with_its_result() -> None:
    fast, _ = both(torchopt.adam)
    fast(*arguments(0), lr=0.05)
    gc.collect()
    gc.disable()
    try:
        given = arguments(1)
        result = fast(*given, lr=0.05)
        held = weakref.ref(given[1][0])
        del given, result
        assert held() is None
    finally:
        gc.enable()


def test_repetitions_in_threads_keep_their_values_apart() -> None:
    fast, slow = both(torchopt.sgd)
    gradients(fast, arguments(0), {"lr": 0.1})
    errors: list[float] = []

    def work(number: int) -> None:
        for _ in range(5):
            got, inputs = gradients(fast, arguments(number), {"lr": 0.1})
            expected, _ = gradients(slow, arguments(number), {"lr": 0.1})
            errors.append(worst(expected, got, inputs))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20
    assert max(errors) < 1e-12


def test_copies_of_a_loop_start_without_repetitions(count: Callable[[], int]) -> None:
    fast, slow = both(torchopt.sgd)
    for _ in range(2):
        assert_same(fast, slow, arguments(0), {"lr": 0.1})
    before = count()
    other = copy.deepcopy(fast)
    other(*arguments(0), lr=0.1)
    assert count() == before + 1
    assert other == fast
