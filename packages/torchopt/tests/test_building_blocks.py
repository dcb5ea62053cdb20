# SPDX-License-Identifier: Apache-2.0
"""The documented building blocks of optimizers, each tested separately."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields
from fractions import Fraction
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import torchopt
from torchopt import base, transform, update, utils
from torchopt.errors import MismatchError
from torchopt.kernels.fused_step import StepCache
from torchopt.optimizers import native, stages
from torchopt.transform import masked, partition, rule, scale
from torchopt.transform import utils as published
from torchopt.transform.base import as_transformation
from torchopt.transform.find_states import places

DOUBLE = torch.float64


class NoState(NamedTuple):
    pass


def test_declared_hyper_parameters_are_checked_and_used() -> None:
    @dataclass(frozen=True)
    class Scaled(rule.Rule):
        """u = (any + at_least_zero + positive + fraction) g."""

        any: rule.Hyper = rule.number()
        low: rule.Hyper = rule.at_least_zero("low value")
        above: rule.Hyper = rule.positive("above value")
        part: rule.Hyper = rule.fraction("part value")
        whole: rule.Hyper = rule.fraction("whole value", closed=True)
        State = NoState

        def apply(self, c: Any, g: Tensor, state: Any, p: Any) -> Any:
            return (self.any + self.low + self.above + self.part + self.whole) * g, ()

    g = {"w": torch.tensor([1.0, -2.0])}
    made = as_transformation(Scaled(-8.0, 0.0, 1.0, 0.0, 1.0), already_flattened=False)
    updates, _ = made.update(g, made.init(g), inplace=False)
    assert updates["w"].tolist() == [-6.0, 12.0]
    good = {"any": -8.0, "low": 0.0, "above": 1.0, "part": 0.0, "whole": 1.0}
    for name, wrong in (("low", -1e-9), ("above", 0.0), ("part", 1.0), ("whole", 1.01)):
        with pytest.raises(ValueError, match=f"Invalid {name} value: {wrong}"):
            Scaled(**{**good, name: wrong})
    assert Scaled(**{**good, "low": torch.tensor(-1.0)}).low == -1.0  # a tensor is not checked


def test_an_object_that_is_not_a_transformation_is_named_with_the_remedy() -> None:
    base.require_transformation(scale(2.0), "f()")
    for value, advice in (
        (torch.optim.Adam, "take the function of that name"),
        (torchopt.adam, "call it: adam"),
        ([scale(2.0)], "unpack it"),
        (3, "scale\\(3\\)"),
        ({}, "pass what a function such as"),
    ):
        with pytest.raises(TypeError, match=rf"^f\(\).*{advice}"):
            base.require_transformation(value, "f()")

    class Duck:
        def init(self, params: Any) -> Any:
            return ()

        update = init

    base.require_transformation(Duck(), "f()")
    with pytest.raises(TypeError, match="Duck"):
        base.require_transformation(Duck(), "f()", duck=False)


def test_a_foreign_state_is_described_by_its_length_or_class() -> None:
    assert base.describe_state((1, 2, 3)) == "3"
    assert base.describe_state([]) == "0"
    assert base.describe_state(NoState()) == "the state of another transformation, NoState"


def test_only_transformations_that_read_the_tree_need_it() -> None:
    mask = masked(scale(2.0), {"w": True})
    assert base.needs_tree(mask)
    assert base.needs_tree(torchopt.chain(scale(1.0), mask))
    assert not base.needs_tree(scale(2.0))
    assert not base.needs_tree(torchopt.adam(0.1))


def test_a_step_in_two_halves_is_the_step() -> None:
    """`launch_step` takes the step that `step_inplace` prepares; before it, nothing is written."""
    optimizer = torchopt.adam(0.1)
    params = [torch.tensor([1.0, -2.0]), torch.tensor([[3.0]])]
    want = [p.clone() for p in params]
    grads = [torch.tensor([0.5, 0.25]), torch.tensor([[-1.0]])]
    expected_state = optimizer.init(want)
    updates, expected_state = optimizer.update(grads, expected_state, params=want, inplace=False)
    want = [p + u for p, u in zip(want, updates)]
    state, cache = optimizer.init(params), StepCache()
    before = [p.clone() for p in params]
    done, following = native.step_inplace(
        optimizer, cache, params, list(grads), state, launch=False
    )
    assert done
    assert all(map(torch.equal, params, before))
    native.launch_step(cache, following)
    torch.testing.assert_close(params, want)
    done, _ = native.step_inplace(scale(-1.0), StepCache(), params, list(grads), ())
    assert not done
    torch.testing.assert_close(params, want)


def test_a_fused_chain_is_the_chain() -> None:
    members = [
        as_transformation(stages.scale_by_neg_lr.rule(0.5), already_flattened=True),
        as_transformation(stages.scale_by_neg_lr.rule(0.25), already_flattened=True),
    ]
    fused = native.FusedChain(tuple(members)).pair()
    g = [torch.tensor([8.0])]
    assert fused.update(g, fused.init(g), inplace=False)[0][0].tolist() == [1.0]


def test_updates_that_cannot_be_written_are_found_before_any_is() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)}
    update.writable(params, {"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int32)})
    with pytest.raises(MismatchError, match=r"\$\['b'\].*expected an update that fits torch.int64"):
        update.writable(params, {"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="updates"):
        update.writable(params, {"a": torch.ones(2)})


def test_updates_are_added_to_writable_tensors() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    update.add_(*update.writable(params, {"a": torch.tensor([1.0, 2.0]), "b": None}))
    assert params["a"].tolist() == [2.0, 3.0]
    assert params["b"].tolist() == [1.0] * 3
    update.add_([], [])


def test_containers_are_the_dictionaries_of_the_modules() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.BatchNorm1d(2))
    params, buffers = utils.extract_module_containers(net)
    assert [id(c) for c in params] == [id(net[0]._parameters), id(net[2]._parameters)]
    assert [id(c) for c in buffers] == [id(net[2]._buffers)]
    assert utils.extract_module_containers(net, with_buffers=False)[1] == ()


@pytest.mark.parametrize("none_is_leaf", [False, True])
def test_flat_maps_skip_none_unless_it_is_a_leaf(none_is_leaf: bool) -> None:
    options = {"none_is_leaf": True} if none_is_leaf else {}
    skipped = "none" if none_is_leaf else None
    for make in (list, tuple):
        called = []

        def join(x: Any, y: Any, called: list[Any] = called) -> str:
            called.append(y)
            return "none" if x is None else x + y

        given = make(["a", None, "b"])
        found = published.tree_map_flat(join, given, "cde", **options)
        assert found == make(["ac", skipped, "be"])
        assert called == (["c", "d", "e"] if none_is_leaf else ["c", "e"])
        assert published.tree_map_flat_(join, given, "cde", **options) is given
        assert called[len(called) // 2 :] == called[: len(called) // 2]


def test_counts_and_moments_move_where_there_is_an_update() -> None:
    largest = 2**63 - 1
    updates = {"a": torch.tensor([2.0]), "b": None, "c": torch.tensor([3.0])}
    count = {"a": torch.tensor(4), "b": torch.tensor(4), "c": torch.tensor(largest)}
    for forms in (published.inc_count, published.inc_count.flat, published.inc_count.impl):
        counted = forms(updates, count)
        assert [counted[k].item() for k in "abc"] == [5, 4, largest]
    for order, moved in ((1, 0.75 * 8 + 0.25 * 2), (2, 0.75 * 8 + 0.25 * 4)):
        for inplace in (False, True):
            moments = {k: torch.tensor([8.0]) for k in "abc"}
            found = published.update_moment(updates, moments, 0.75, order=order, inplace=inplace)
            assert [found[k].item() for k in "ab"] == [moved, 8.0]
            assert (found["a"] is moments["a"]) == inplace
            assert moments["a"].item() == (moved if inplace else 8.0)
    with pytest.raises(ValueError, match="expected order 1 or 2, got 3"):
        published.update_moment(updates, moments, 0.75, order=3)


def test_objects_with_a_float_value_are_numbers() -> None:
    """Objects with a float value are checked like a float."""
    g = {"w": torch.tensor([2.0])}
    optimizer = torchopt.sgd(Fraction(1, 4))
    assert optimizer.update(g, optimizer.init(g), params=g)[0]["w"].tolist() == [-0.5]
    with pytest.raises(ValueError, match="Invalid learning rate: -1/4"):
        torchopt.sgd(Fraction(-1, 4))
    with pytest.raises(TypeError, match="expected a number or a tensor"):
        torchopt.sgd("0.25")


def test_a_state_for_more_leaves_than_there_are_has_no_place() -> None:
    values = [torch.ones(2), torch.ones(3), torch.ones(2)]
    assert places(values, {"a": values[0], "b": values[1], "c": None}, None, "f()") == [0, 1, 2]
    with pytest.raises(ValueError, match=r"f\(\): expected a state for 2 leaves, got one for 3"):
        places(values, {"a": values[0], "b": values[1]}, None, "f()")


def test_the_parts_of_a_partition_are_transformations() -> None:
    with pytest.raises(TypeError, match=r"partition\(.*at 'b'.*unpack it"):
        partition({"a": scale(2.0), "b": [scale(2.0)]}, lambda params: "a")


def test_transformations_are_values() -> None:
    """They are immutable, because a chain caches them."""
    wrapped = [
        transform.freeze({"w": True}),
        masked(scale(2.0), {"w": True}),
        partition({"a": scale(2.0)}, lambda params: "a"),
        *(make(scale(2.0)) for make in (transform.sam, transform.lookahead, transform.cautious)),
        *(make(scale(2.0), 2) for make in (transform.accumulate, transform.apply_if_finite)),
        torchopt.chain(scale(2.0), scale(3.0)),
    ]
    for transformation in wrapped:
        owner = transformation.update.__self__
        with pytest.raises(FrozenInstanceError):
            setattr(owner, fields(owner)[0].name, None)
