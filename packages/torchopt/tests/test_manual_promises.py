# SPDX-License-Identifier: Apache-2.0
"""The promises of the READMEs and of the page of concepts, for every optimizer and engine."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt import alias
from torchopt.diff import Explicit, Implicit, ZeroOrder, zero_order
from torchopt.errors import KernelUnavailableError
from torchopt.index import OPTIMIZERS
from torchopt.kernels import native
from torchopt.optimizers.native import with_backend
from torchopt.tree import tree_leaves, tree_map
from torchopt.update import apply_updates

NAMES = sorted(OPTIMIZERS)

# These divide by the root of a second moment from the first step on, without an epsilon in it.
ROOTS = (
    "adagrad",
    "adam",
    "adamw",
    "adan",
    "amsgrad",
    "amsgradw",
    "lamb",
    "nadam",
    "nadamw",
    "rmsprop",
)


def data(seed: int) -> dict[str, Tensor]:
    """Return a matrix and a vector."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "b": torch.randn(3, generator=generator, dtype=torch.float64),
        "w": torch.randn(4, 3, generator=generator, dtype=torch.float64),
    }


@pytest.mark.parametrize("name", NAMES)
def test_in_place_or_not_the_numbers_are_the_same(name: str) -> None:
    results = []
    for inplace in (False, True):
        optimizer = getattr(alias, name)(lr=0.1)
        params = data(0)
        state = optimizer.init(params)
        for step in range(1, 8):
            updates, state = optimizer.update(data(step), state, params=params, inplace=inplace)
            params = apply_updates(params, updates, inplace=inplace)
        results.append(params)
    assert not torch.equal(results[0]["w"], data(0)["w"])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-14)


def of_leaf(state: Any, key: str) -> list[Tensor]:
    """Return the entries of a state for one leaf of the parameters."""
    if isinstance(state, dict):
        found = tree_leaves(state.get(key))
        return [leaf.clone() for leaf in found if isinstance(leaf, Tensor)]
    if isinstance(state, (tuple, list)):
        return [tensor for part in state for tensor in of_leaf(part, key)]
    return []


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_none_leaves_its_parameter_and_its_state_unchanged(name: str) -> None:
    optimizer = getattr(alias, name)(lr=0.1)
    params = data(0)
    state = optimizer.init(params)
    for step in range(1, 8):  # after the first steps, in which some do not move
        _, state = optimizer.update(data(step), state, params=params, inplace=False)
    before = of_leaf(state, "b")
    updates, after = optimizer.update({**data(9), "b": None}, state, params=params, inplace=False)
    stepped = apply_updates(params, updates, inplace=False)
    assert torch.equal(stepped["b"], params["b"])
    assert not torch.equal(stepped["w"], params["w"])
    torch.testing.assert_close(of_leaf(after, "b"), before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", ROOTS)
def test_where_the_second_moment_is_zero_the_derivative_of_the_update_is_zero(name: str) -> None:
    optimizer = getattr(alias, name)(lr=0.1)
    params = data(0)
    grads = tree_map(lambda p: torch.zeros_like(p, requires_grad=True), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params=params, inplace=False)
    total = sum(leaf.sum() for leaf in updates.values())
    for slope in torch.autograd.grad(total, list(grads.values())):
        assert torch.equal(slope, torch.zeros_like(slope))


# With the default settings one kernel computes the step.
FUSED = ("adabelief", "adadelta", "adagrad", "adam", "adamax", "adamw", "adan", "ademamix",
         "amsgrad", "amsgradw", "asgd", "lion", "nadam", "nadamw", "radam", "rmsprop", "rprop",
         "sgd", "signum")  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_with_a_kernel_the_whole_step_is_one_native_call(
    name: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = getattr(alias, name)(lr=0.1)
    params = data(0)
    state = optimizer.init(params)
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = native.attempt(*args, **kwargs)
        calls.append(not isinstance(found, Exception))
        return found

    monkeypatch.setattr("torchopt.transform.fused.attempt", counted)
    for step in (1, 2):
        _, state = optimizer.update(data(step), state, params=params, inplace=inplace)
        assert calls == [True] * step


@pytest.mark.parametrize("name", FUSED)
def test_with_a_kernel_the_derivative_of_a_step_is_one_operation(name: str) -> None:
    optimizer = with_backend(getattr(alias, name)(lr=0.1), "native")
    params = data(0)
    grads = tree_map(lambda g: g.requires_grad_(), data(1))
    updates, _ = optimizer.update(grads, optimizer.init(params), params=params, inplace=False)
    functions = {leaf.grad_fn for leaf in updates.values()}
    assert len(functions) == 1
    assert None not in functions


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_without_a_kernel_plain_operations_run_unless_a_kernel_is_requested(
    dtype: torch.dtype,
) -> None:
    p, g = torch.ones(3).to(dtype), torch.ones(3).to(dtype)
    for accelerated in (False, True):
        optimizer = alias.adam(0.1, use_accelerated_op=accelerated)
        state = optimizer.init(p)
        if accelerated:
            with pytest.raises(KernelUnavailableError, match="fused kernel was requested"):
                optimizer.update(g, state, inplace=False)
        elif dtype.is_complex:
            updates, _ = optimizer.update(g, state, inplace=False)
            torch.testing.assert_close(updates, torch.full_like(p, -0.1), rtol=1e-5, atol=1e-6)


class Saved:
    """A tensor that a graph keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept(engine: Any, steps: int) -> int:
    """Return how many numbers the graph of a run keeps."""

    def loss(x: Tensor, batch: None, theta: Tensor) -> Tensor:
        return ((x - 1) ** 2).sum() + ((x - theta) ** 4).sum()

    saved: list[weakref.ref[Saved]] = []
    theta = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    run = engine.over(loss, torchopt.sgd(0.02), steps=steps)

    def save(x: Tensor) -> Saved:
        kept = Saved(x)
        saved.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept.tensor):
        result = run(torch.zeros(5, dtype=torch.float64), None, theta)
    assert result.params.requires_grad
    alive = [reference() for reference in saved]
    return sum(x.tensor.numel() for x in alive if x is not None)


@pytest.mark.parametrize("family", ["explicit", "implicit", "zero-order"])
def test_memory_grows_with_the_steps_of_explicit_differentiation_alone(family: str) -> None:
    engine: Any = {
        "explicit": Explicit(),
        "implicit": Implicit(),
        "zero-order": ZeroOrder(zero_order.Gaussian(), "antithetic", num_samples=4, sigma=0.1),
    }[family]
    few, many = kept(engine, 200), kept(engine, 400)
    if family == "explicit":
        assert many > 1.9 * few
    else:
        assert many == few
