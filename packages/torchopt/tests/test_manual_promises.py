# SPDX-License-Identifier: Apache-2.0
"""What the page of concepts promises of every optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt import alias
from torchopt.index import OPTIMIZERS
from torchopt.tree import tree_leaves, tree_map
from torchopt.update import apply_updates

NAMES = sorted(OPTIMIZERS)

# These divide by the root of a second moment, with no epsilon under it and from the first step on.
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
    """Return what a state has for one leaf of the parameters."""
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
    for step in range(1, 8):  # beyond the first steps, in which some stand still
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
