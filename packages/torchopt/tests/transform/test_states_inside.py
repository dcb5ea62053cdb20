# SPDX-License-Identifier: Apache-2.0
"""Masks and states inside of wrappers, flat chains, masks and partitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchopt
from torchopt import alias, transform
from torchopt.optim import TorchOptimizer
from torchopt.pytree import tree_map

PARAMS = {"b": torch.ones(1), "w": torch.ones(1, 1), "x": torch.full((2,), 3.0)}
MASK = {"b": False, "w": True, "x": False}

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda t: t,
    "accumulate": lambda t: transform.accumulate(t, 1),
    "lookahead": lambda t: transform.lookahead(t, 5),
    "apply_if_finite": transform.apply_if_finite,
    "in_precision": lambda t: transform.in_precision(t, torch.float64),
    "chain": lambda t: torchopt.chain(t, transform.scale(1.0)),
    "chain.flat": lambda t: torchopt.chain.flat(t, transform.scale(1.0)),
    "chain.flat of one": lambda t: torchopt.chain.flat(t),
    "inject_hyperparams": lambda t: transform.inject_hyperparams(
        lambda step: torchopt.chain(t, transform.scale(step))
    )(step=1.0),
    "twice": lambda t: transform.accumulate(transform.apply_if_finite(t), 1),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_mask_inside_of_a_wrapper_sees_the_tree_in_a_flat_chain(wrapper: str) -> None:
    member = WRAPPERS[wrapper](transform.masked(transform.scale(0.0), MASK))
    plain = torchopt.chain(member, transform.scale(-1.0))
    flat = torchopt.chain.flat(member, transform.scale(-1.0))
    for optimizer in (plain, flat):
        state = optimizer.init(PARAMS)
        for _ in range(2):
            updates, state = optimizer.update(PARAMS, state, params=PARAMS, inplace=False)
            assert {k: u.tolist() for k, u in updates.items()} == {
                "b": [-1.0],
                "w": [[0.0]],
                "x": [-3.0, -3.0],
            }


def test_the_mask_of_adamw_sees_the_tree_in_a_flat_chain() -> None:
    optimizer = torchopt.adamw(0.1, weight_decay=0.5, mask=MASK)
    found = []
    for chain in (torchopt.chain, torchopt.chain.flat):
        chained = chain(torchopt.clip_grad_norm(1e9), optimizer)
        updates, _ = chained.update(PARAMS, chained.init(PARAMS), params=PARAMS, inplace=False)
        found.append(updates)
    torch.testing.assert_close(found[0]["w"], torch.full((1, 1), -0.15))
    assert all(torch.equal(found[0][key], found[1][key]) for key in PARAMS)


def stepped(optimizer: Any, params: Any, steps: int = 3) -> tuple[Any, Any]:
    state = optimizer.init(params)
    for k in range(steps):
        grads = tree_map(lambda p, k=k: p * 0.1 * (k + 1), params)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params, state


@pytest.mark.parametrize("inside", ["partition", "masked"])
def test_averages_are_found_inside(inside: str) -> None:
    schedule_free = alias.schedule_free_sgd(0.1)
    optimizer = {
        "partition": transform.partition(
            {"a": schedule_free, "s": torchopt.sgd(0.1)}, {"b": "s", "w": "a", "x": "a"}
        ),
        "masked": transform.masked(schedule_free, {"b": False, "w": True, "x": True}),
    }[inside]
    params, state = stepped(optimizer, PARAMS)
    own, own_state = stepped(schedule_free, {"w": PARAMS["w"], "x": PARAMS["x"]})
    want = transform.averaged_params(own_state, own)
    got = transform.averaged_params(state, params)
    assert torch.equal(got["w"], want["w"])
    assert torch.equal(got["x"], want["x"])
    assert not torch.equal(got["w"], params["w"])
    assert got["b"] is params["b"]


def test_averages_of_two_parts_are_put_together() -> None:
    labels = {"b": "one", "w": "two", "x": "one"}
    optimizer = transform.partition(
        {"one": alias.schedule_free_sgd(0.1), "two": alias.schedule_free_sgd(0.3)}, labels
    )
    params, state = stepped(optimizer, PARAMS)
    got = transform.averaged_params(state, params)
    for key, lr in (("b", 0.1), ("w", 0.3), ("x", 0.1)):
        own, own_state = stepped(alias.schedule_free_sgd(lr), PARAMS[key])
        torch.testing.assert_close(got[key], transform.averaged_params(own_state, own))


def test_leaves_of_one_shape_must_be_distinguished() -> None:
    params = {"a": torch.ones(2), "b": torch.full((2,), 2.0)}
    mask = {"a": False, "b": True}
    for kind, read in (
        (alias.schedule_free_sgd(0.1), lambda s, **k: transform.averaged_params(s, params, **k)),
        (
            alias.sophia(update_every=None),
            lambda s, **k: transform.observe_curvature(s, params, 0.5, **k),
        ),
    ):
        _, state = stepped(transform.masked(kind, mask), params)
        with pytest.raises(ValueError, match="more than one way to place them: pass where="):
            read(state)
        with pytest.raises(ValueError, match="expected `where` to keep the 1 leaves"):
            read(state, where=True)
        read(state, where=mask)
    _, state = stepped(transform.masked(alias.schedule_free_sgd(0.1), mask), params)
    averages = transform.averaged_params(state, params, where=mask)
    assert averages["a"] is params["a"]
    assert not torch.equal(averages["b"], params["b"])


def test_curvature_is_observed_inside_a_partition() -> None:
    sophia = alias.sophia(update_every=None)
    optimizer = transform.partition(
        {"h": sophia, "s": torchopt.sgd(0.1)}, {"b": "s", "w": "h", "x": "h"}
    )
    state = transform.observe_curvature(optimizer.init(PARAMS), PARAMS, 0.5)
    own = {"w": PARAMS["w"], "x": PARAMS["x"]}
    want = transform.observe_curvature(sophia.init(own), own, 0.5)
    for x, y in zip(state.inner_states["h"][0].h, want[0].h):
        assert torch.equal(x, y)
        assert x.abs().max() > 0


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_mean_that_is_half_collected_survives_saving(calls: int) -> None:
    def run(save: bool) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(2))
        make = lambda lr: transform.accumulate(torchopt.adam(lr), 2)  # noqa: E731
        optimizer = TorchOptimizer([p], make, lr=0.1)
        for k in range(4):
            p.grad = torch.full((2,), 0.5 + k)
            optimizer.step()
            if save and k + 1 == calls:
                saved = optimizer.state_dict()
                optimizer = TorchOptimizer([p], make, lr=0.1)
                optimizer.load_state_dict(saved)
        return p.detach()

    assert torch.equal(run(True), run(False))
