# SPDX-License-Identifier: Apache-2.0
"""Steps of SGD on few tensors take a shorter way, to the same values and derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import torchopt
from torchopt.optimizers import short
from torchopt.optimizers.short import next_params
from torchopt.torch_internals import backward_pass

SETTINGS = (
    {},
    {"maximize": True},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "moment_requires_grad": True},
)
SHAPES = ((3, 2), (2,), ())


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for s in SHAPES
    ]


def two_steps(optimizer: Any, step: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return parameters after two steps on a loss that curves, the first ones, and the starts of
    the state.
    """
    params = first = tensors(0)
    state = optimizer.init(tuple(params))
    starts = [x for x in torchopt.pytree.tree_leaves(state) if x.requires_grad]
    for scale in (1.0, 2.0):
        loss = sum((scale * p * p.sin()).sum() for p in params)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        params, state = step(optimizer, params, grads, state)
    return list(params), first, starts


def the_long_way(
    optimizer: Any, params: list[Tensor], grads: Any, state: Any
) -> tuple[list[Tensor], Any]:
    updates, state = optimizer.update(tuple(grads), state, params=tuple(params), inplace=False)
    return torchopt.apply_updates(tuple(params), updates, inplace=False), state


def derivatives(found: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Return first and second derivatives."""
    grads = torch.autograd.grad(sum((x**2).sum() for x in found), leaves, create_graph=True)
    return [*grads, *torch.autograd.grad(sum((g**2).sum() for g in grads), leaves)]


@pytest.mark.parametrize("small", [0, short.SMALL])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_values_and_derivatives_are_those_of_the_long_way(
    settings: dict[str, Any], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(short, "SMALL", small)
    calls = []
    inner = short.short_step
    monkeypatch.setattr(short, "short_step", lambda *a: calls.append(inner(*a)) or calls[-1])
    optimizer = torchopt.sgd(0.1, **settings)
    found, first, starts = two_steps(optimizer, next_params)
    assert len(calls) == 2
    assert None not in calls
    expected, other_first, other_starts = two_steps(optimizer, the_long_way)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert len(starts) == len(other_starts) == (3 if "moment_requires_grad" in settings else 0)
    torch.testing.assert_close(
        derivatives(found, [*first, *starts]), derivatives(expected, [*other_first, *other_starts])
    )


def test_momentum_is_a_closed_form() -> None:
    """p2 = p0 - lr g1 - lr (m g1 + g2), for the loss p'p / 2 whose gradient is p."""
    optimizer = torchopt.sgd(0.1, momentum=0.9)
    params = start = tensors(1)
    state = optimizer.init(tuple(params))
    for _ in range(2):
        params, state = next_params(optimizer, params, [p * 1.0 for p in params], state)
    factor = 0.9 - 0.1 * (0.9 + 0.9)
    torch.testing.assert_close(list(params), [factor * p for p in start])


@pytest.mark.parametrize(
    "case", ["a missing gradient", "half", "mixed", "many", "a learned lr", "a schedule", "sparse"]
)
def test_what_is_not_plain_goes_the_long_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lr: Any = 0.1
    dtype = torch.bfloat16 if case == "half" else torch.float64
    params = tensors(0, dtype)
    grads: list[Any] = [g.detach() for g in tensors(1, dtype)]
    if case == "a missing gradient":
        grads[1] = None
    elif case == "mixed":
        params[1] = params[1].detach().to(torch.float16).requires_grad_()
        grads[1] = grads[1].to(torch.float16)
    elif case == "many":
        monkeypatch.setattr(short, "MANY", 2)
    elif case == "a learned lr":
        lr = torch.tensor(0.1, requires_grad=True)
    elif case == "a schedule":
        lr = torchopt.schedule.linear_schedule(0.1, 0.0, 10)
    elif case == "sparse":
        grads[0] = grads[0].to_sparse()
    optimizer = torchopt.sgd(lr)
    state = optimizer.init(tuple(params))
    if isinstance(lr, float):
        assert short.short_step(optimizer, params, grads, state) is None
    found, _ = next_params(optimizer, params, grads, state)
    expected, _ = the_long_way(optimizer, params, grads, state)
    torch.testing.assert_close(list(found), list(expected))
    if case == "a learned lr":
        assert torch.autograd.grad(sum(x.sum() for x in found), lr)[0] != 0


@pytest.mark.parametrize("settings", SETTINGS[:5], ids=str)
def test_transforms_of_steps_are_those_of_the_long_way(settings: dict[str, Any]) -> None:
    optimizer = torchopt.sgd(0.1, **settings)

    def by(step: Any) -> Any:
        def run(*params: Tensor) -> tuple[Tensor, ...]:
            state = optimizer.init(params)
            return tuple(step(optimizer, list(params), [p.sin() for p in params], state)[0])

        return run

    params = tuple(p.detach() for p in tensors(2))
    rows = tuple(torch.stack([p, 2 * p]) for p in params)
    for transform in (
        lambda f: torch.func.vmap(f)(*rows),
        lambda f: torch.func.jvp(f, params, params)[1],
        lambda f: torch.func.vjp(f, *params)[1](params),
    ):
        torch.testing.assert_close(transform(by(next_params)), transform(by(the_long_way)))


def test_a_state_of_other_parameters_is_refused() -> None:
    optimizer = torchopt.sgd(0.1, momentum=0.9)
    params = tensors(0)
    state = optimizer.init(tuple(p.detach().reshape(-1) for p in params))
    with pytest.raises(torchopt.errors.MismatchError):
        next_params(optimizer, params, [p.detach() for p in params], state)


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_backward_pass_is_that_of_torch(create_graph: bool) -> None:
    params = tensors(0)
    unused = torch.ones(2, requires_grad=True)
    loss = sum((p * p.sin()).sum() for p in params)
    options: dict[str, Any] = {"create_graph": create_graph, "retain_graph": True}
    found = backward_pass(loss, [*params, unused], **options)
    expected = torch.autograd.grad(loss, [*params, unused], allow_unused=True, **options)
    assert found[-1] is None
    assert expected[-1] is None
    for x, y in zip(found[:-1], expected[:-1]):
        assert torch.equal(x, y)
        assert x.requires_grad == create_graph
    with Seen() as seen:
        backward_pass(loss, params, **options)
    assert "grad" in seen.names  # who overrides torch's functions is asked
    with pytest.raises(RuntimeError, match="real"):
        backward_pass((params[0] * 1j).sum(), params[:1], **options)


def test_a_backward_pass_frees_the_graph() -> None:
    (p, *_) = tensors(0)
    loss = (p**2).sum()
    backward_pass(loss, [p], create_graph=False, retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        backward_pass(loss, [p], create_graph=False, retain_graph=False)


def test_a_custom_tensor_gives_its_own_backward_pass() -> None:
    class Own(Tensor):
        pass

    p = torch.ones(2, dtype=torch.float64).as_subclass(Own).requires_grad_()
    (found,) = backward_pass((p**2).sum(), [p], create_graph=True, retain_graph=True)
    assert isinstance(found, Own)
    assert torch.equal(found, 2 * p)


def kept(params: list[Tensor]) -> int:
    """Return how many tensors a step keeps for its derivative."""
    grads = [torch.ones_like(p) for p in params]
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        next_params(torchopt.sgd(0.1), params, grads, torchopt.sgd(0.1).init(tuple(params)))
    return len(found)


def test_steps_of_large_tensors_keep_nothing() -> None:
    assert kept([torch.zeros(short.SMALL + 1, requires_grad=True)]) == 0
    assert kept([torch.zeros(short.SMALL, requires_grad=True)]) == 2
