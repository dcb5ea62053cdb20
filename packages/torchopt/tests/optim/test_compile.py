# SPDX-License-Identifier: Apache-2.0
"""Training steps and meta-steps are traced by torch.compile in one piece."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import Tensor

import torchopt
from torchopt import transform

DOUBLE = torch.float64
Params = dict[str, Tensor]


def problem(name: str) -> tuple[Callable[..., Any], Callable[..., Any], Params, Tensor]:
    """Return a training step, a meta-step, parameters and data for the optimizer `name`.

    The meta-step is the gradient, with respect to the data too, of the loss after two steps.
    """
    row = ROWS[name]
    optimizer = row.functional(**row.settings[0])

    def loss(params: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ params["w"] + params["b"]).pow(2).mean()

    def step(params: Params, state: Any, x: Tensor) -> tuple[Params, Any]:
        grads = torch.func.grad(loss)(params, x)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), state

    def after_two_steps(start: Params, x: Tensor) -> Tensor:
        params, state = start, optimizer.init(start)
        for _ in range(2):
            params, state = step(params, state, x)
        return loss(params, x)

    generator = torch.Generator().manual_seed(0)
    start = {
        "b": torch.randn(2, generator=generator, dtype=DOUBLE),
        "w": torch.randn(3, 2, generator=generator, dtype=DOUBLE),
    }
    x = torch.randn(5, 3, generator=generator, dtype=DOUBLE)

    def train(params: Params, state: Any, x: Tensor) -> tuple[Params, Any]:
        return step(params, optimizer.init(params) if state is None else state, x)

    return train, torch.func.grad(after_two_steps, argnums=(0, 1)), start, x


# Their steps differ in what they compute, by the number of the step.
BY_THE_STEP = {"shampoo", "soap"}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_training_step_is_one_graph_and_compiled_once(name: str) -> None:
    train, _, start, x = problem(name)
    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True, backend="eager")
    results = []
    for function in (train, compiled):
        params, state = train(dict(start), None, x)  # init is not a part of a training step
        for number in range(3):
            again = number > 0 and name not in BY_THE_STEP
            with torch.compiler.set_stance("fail_on_recompile" if again else "default"):
                params, state = function(params, state, x)
        results.append(params)
    for key in start:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-11, atol=1e-12)
    assert not torch.equal(results[0]["w"], start["w"])


@pytest.mark.parametrize("name", ["adamax", "radam"])
def test_states_of_eager_and_compiled_steps_are_one_program(name: str) -> None:
    """`t` is an int in eager states, as in those of the published package, and else a tensor."""
    train, _, params, x = problem(name)
    torch._dynamo.reset()
    compiled = torch.compile(train, fullgraph=True, backend="eager")
    params, state = train(dict(params), None, x)
    want_params, want = train(params, state, x)
    numbers = [state[0].t]
    for number, function in enumerate([compiled, compiled, train, compiled, train]):
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            params, state = function(params, state, x)
        if number:
            want_params, want = train(want_params, want, x)
        torch.testing.assert_close(params, want_params, rtol=1e-12, atol=1e-13)
        numbers.append(state[0].t)
    assert [int(t) for t in numbers] == [2, 3, 4, 5, 6, 7]
    assert isinstance(want[0].t, int)
    assert want[0].t == 7


def instructions_traced(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many instructions torch.compile follows for tensors with counts of their own."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    optimizer = ROWS[name].functional(**ROWS[name].settings[0])
    params = {str(i): torch.ones(2) for i in range(size)}
    # Copies of the count that the tensors share at first.
    state = torchopt.pytree.tree_map(Tensor.clone, optimizer.init(params))
    step_of, seen = InstructionTranslatorBase.step, [0]

    def counted(self: Any) -> Any:
        seen[0] += 1
        return step_of(self)

    def step(grads: Params, state: Any) -> Any:
        return optimizer.update(grads, state, params=params, inplace=False)

    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(InstructionTranslatorBase, "step", counted)
        torch.compile(step, fullgraph=True, backend="eager")(params, state)
    return seen[0]


@pytest.mark.parametrize("name", ["adam", "nadam"])
def test_a_trace_is_linear_in_the_number_of_counts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (instructions_traced(name, size, monkeypatch) for size in (12, 36))
    assert few > 1000
    assert many < 3.2 * few


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_meta_step_is_one_graph(name: str) -> None:
    _, meta_step, start, x = problem(name)
    torch._dynamo.reset()
    compiled = torch.compile(meta_step, fullgraph=True, backend="eager")
    (params_grad, data_grad), (wanted, data_wanted) = compiled(start, x), meta_step(start, x)
    for key in start:
        torch.testing.assert_close(params_grad[key], wanted[key], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(data_grad, data_wanted, rtol=1e-10, atol=1e-12)
    assert data_wanted.abs().max() > 1e-6


WRAPPED = {
    "accumulate": lambda: transform.accumulate(torchopt.sgd(0.1), 2),
    "masked": lambda: transform.masked(torchopt.sgd(0.1), {"w": True, "b": False}),
    "freeze": lambda: torchopt.chain(torchopt.sgd(0.1), transform.freeze({"w": False, "b": True})),
}


@pytest.mark.parametrize("name", sorted(WRAPPED))
def test_a_step_beside_a_tree_without_tensors_is_one_graph(name: str) -> None:
    torch._dynamo.reset()
    optimizer = WRAPPED[name]()
    params = {"w": torch.ones(3), "b": torch.zeros(2)}

    def step(params: Params, state: Any) -> tuple[Params, Any]:
        grads = {name: p + 1 for name, p in params.items()}
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False), state

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    got, wanted = (params, optimizer.init(params)), (params, optimizer.init(params))
    for _ in range(2):
        got, wanted = compiled(*got), step(*wanted)
    torch.testing.assert_close(got[0], wanted[0])
    assert not torch.equal(got[0]["w"], params["w"])


@pytest.mark.parametrize("shapes", [((3, 2), (2, 3)), ((3,), (2,)), ((4, 4),)], ids=str)
def test_muon_is_one_graph_with_matrices_alone_and_without_any(shapes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    params = {
        str(i): torch.randn(shape, generator=generator, dtype=DOUBLE)
        for i, shape in enumerate(shapes)
    }
    optimizer = torchopt.muon(0.1)

    def step(params: Params) -> Params:
        state = optimizer.init(params)
        updates, _ = optimizer.update(params, state, params=params, inplace=False)
        return torchopt.apply_updates(params, updates, inplace=False)

    torch._dynamo.reset()
    got, wanted = torch.compile(step, fullgraph=True, backend="eager")(params), step(params)
    for key, p in params.items():
        torch.testing.assert_close(got[key], wanted[key], rtol=1e-12, atol=1e-13)
        assert not torch.equal(wanted[key], p)


@pytest.mark.parametrize(("name", "backend"), [("sgd", "inductor"), ("adamw", "aot_eager")])
def test_backends_agree(name: str, backend: str) -> None:
    _, meta_step, start, x = problem(name)
    torch._dynamo.reset()
    compiled = torch.compile(meta_step, fullgraph=True, backend=backend)
    got, wanted = compiled(start, x), meta_step(start, x)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


MADE_INSIDE = {name: row.functional for name, row in ROWS.items()} | {
    "adam, accelerated": functools.partial(torchopt.adam, use_accelerated_op=True),
    "adamw, decaying": lambda lr: torchopt.adamw(
        torchopt.schedule.exponential_decay(lr, 10, 0.9), weight_decay=lr
    ),
    "clipped sgd": lambda lr: torchopt.chain(
        torchopt.clip.clip_grad_norm(1.0), torchopt.sgd(lr, momentum=0.9)
    ),
}
# Tracing one takes seconds: they are compiled for inductor only, which traces as aot_eager does.
HEAVY = ("psgd", "shampoo", "soap")
LOOKS_FIRST = frozenset(("adopt", "schedule_free_radam"))  # no update in the first step
FEW = ("adam", "adam, accelerated", "clipped sgd", "lion", "rmsprop")


def assert_made_inside(names: Sequence[str], backend: str) -> None:
    """Compile one function that makes optimizers from a tensor and takes a step with each."""
    _, _, start, _ = problem("sgd")
    start = {"w": start["w"]}

    def first(params: Params, lr: Tensor) -> dict[str, Any]:
        steps = {}
        for name in names:
            optimizer = MADE_INSIDE[name](lr)
            state = optimizer.init(params)
            steps[name] = optimizer.update(params, state, params=params, inplace=False)[0]["w"]
        return steps

    torch._dynamo.reset()
    lr = torch.tensor(0.1, dtype=DOUBLE)
    compiled = torch.compile(first, fullgraph=True, backend=backend)
    for value in (lr, lr / 2):
        got, wanted = compiled(start, value), first(start, value)
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)
    assert {name for name in names if wanted[name].any()} >= {*names} - LOOKS_FIRST


def group(part: int) -> list[str]:
    """Return every fourth of the optimizers that are compiled quickly, for one function."""
    return sorted(MADE_INSIDE.keys() - set(HEAVY))[part::4]


@pytest.mark.parametrize("part", range(4))
def test_optimizers_are_made_inside(part: int) -> None:
    assert_made_inside(group(part), "aot_eager")


def test_optimizers_are_made_inside_for_inductor() -> None:
    assert_made_inside(FEW, "inductor")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check`:FutureWarning")
@pytest.mark.parametrize("names", [*map(group, range(4)), *([name] for name in HEAVY)], ids=str)
def test_all_optimizers_are_made_inside_for_inductor(names: list[str]) -> None:
    assert_made_inside(names, "inductor")


def test_the_gradient_of_a_rate_that_makes_an_optimizer_inside() -> None:
    _, _, start, x = problem("sgd")

    def loss(params: Params) -> Tensor:
        return torch.tanh(x @ params["w"] + params["b"]).pow(2).mean()

    def after(lr: Tensor) -> Tensor:
        params = start
        for make in (torchopt.adam, MADE_INSIDE["adam, accelerated"]):
            optimizer = make(lr)
            grads, state = torch.func.grad(loss)(params), optimizer.init(params)
            updates, _ = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
        return loss(params)

    lr = torch.tensor(0.1, dtype=DOUBLE)
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(after), fullgraph=True, backend="aot_eager")
    wanted = torch.func.grad(after)(lr)
    torch.testing.assert_close(compiled(lr), wanted, rtol=1e-10, atol=1e-12)
    assert wanted.abs() > 1e-3
