# SPDX-License-Identifier: Apache-2.0
"""Ten steps equal torch.optim: functional, in place, object-oriented and as part of the graph."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from optimizers import CASE_IDS, CASES, ROWS, Row
from parity import APART, FLOAT32_FORMS, FORMS, bfloat16_differences, difference, twin
from problems import loss_of, zoo
from torch import Tensor, nn

import torchopt
from torchopt.optimizers.native import with_backend

STEPS = 10
# Both sides do the same float64 arithmetic in a different order: some 30 roundings a step,
# amplified by 1 / eps of the tiny denominators of the first steps at most to this.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


class Zoo(nn.Module):
    def __init__(self, params: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def loss(self) -> Tensor:
        return loss_of({name: getattr(self, name) for name in ("b", "empty", "s", "w")})


def twin_steps(row: Row, settings: dict[str, Any]) -> dict[str, Tensor]:
    return _twin_steps(row.name, row.settings.index(settings))


@functools.cache
def _twin_steps(name: str, index: int) -> dict[str, Tensor]:
    row, settings = ROWS[name], ROWS[name].settings[index]
    params = {k: v.clone().requires_grad_() for k, v in zoo().items()}
    optimizer = row.twin(params.values(), **settings)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(params).backward()
        optimizer.step()
    return {k: v.detach() for k, v in params.items()}


def check(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    for name in expected:
        torch.testing.assert_close(
            got[name].detach(), expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )
    assert any((expected[n] - zoo()[n].to(expected[n])).abs().max() > 1e-3 for n in ("b", "s", "w"))


@pytest.mark.parametrize(("row", "settings"), CASES, ids=CASE_IDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_functional_steps_equal_torch(row: Row, settings: dict[str, Any], inplace: bool) -> None:
    optimizer = row.functional(**settings)
    params = {k: v.clone().requires_grad_() for k, v in zoo().items()}
    state = optimizer.init(params)
    for _ in range(STEPS):
        grads = torch.autograd.grad(loss_of(params), list(params.values()))
        tree = dict(zip(params, grads))
        updates, state = optimizer.update(tree, state, params=params, inplace=inplace)
        params = torchopt.apply_updates(params, updates, inplace=inplace)
        params = {k: v.detach().requires_grad_() for k, v in params.items()}
    check(params, twin_steps(row, settings), **TOLERANCE)


@pytest.mark.parametrize(("row", "settings"), CASES, ids=CASE_IDS)
def test_meta_steps_equal_torch(row: Row, settings: dict[str, Any]) -> None:
    net = Zoo(zoo())
    optimizer = row.meta(net, **settings)
    for _ in range(STEPS):
        optimizer.step(net.loss())
        # Ten full graphs of the larger settings are not needed here; test_meta differentiates
        # through them.
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(optimizer)
    check({name: getattr(net, name) for name in zoo()}, twin_steps(row, settings), **TOLERANCE)


@pytest.mark.parametrize("form", sorted(FORMS))
@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_form_equals_torch(name: str, form: str) -> None:
    row = ROWS[name]
    if row.joint and form in APART:
        pytest.skip("a step of these tensors is another one without the others")
    for settings in row.settings:
        expected = twin(row, settings)
        assert difference(FORMS[form](row, settings), expected) < 1e-12, settings
        assert difference(expected, zoo()) > 1e-4


@pytest.mark.parametrize("form", sorted(FLOAT32_FORMS))
@pytest.mark.parametrize("name", sorted(ROWS))
def test_float32_equals_torch(name: str, form: str) -> None:
    row = ROWS[name]
    if row.joint and form in APART:
        pytest.skip("a step of these tensors is another one without the others")
    # Shampoo's roots take forty products of matrices; its reference an eigendecomposition.
    tolerance = 1e-5 if name == "shampoo" else 1e-6
    for settings in row.settings:
        expected = twin(row, settings, torch.float32)
        assert difference(FLOAT32_FORMS[form](row, settings), expected) < tolerance, settings


@pytest.mark.parametrize("name", sorted(ROWS))
def test_bfloat16_updates_are_those_of_float32_rounded_once(name: str) -> None:
    row = ROWS[name]
    for settings in row.settings:
        assert bfloat16_differences(row, settings) == 0, settings


@pytest.mark.parametrize("use_accelerated_op", [False, True])
def test_fused_adam_steps_equal_torch(use_accelerated_op: bool) -> None:
    for settings in ROWS["adam"].settings:
        params = {k: v.clone().requires_grad_() for k, v in zoo().items()}
        optimizer = torchopt.Adam(
            params.values(), **settings, use_accelerated_op=use_accelerated_op
        )
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss_of(params).backward()
            optimizer.step()
        check(params, twin_steps(ROWS["adam"], settings), **TOLERANCE)


def test_missing_gradients_leave_parameter_and_state_untouched() -> None:
    for row in ROWS.values():
        optimizer = row.functional(**row.settings[-1])
        params = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
        state = optimizer.init(params)
        both = {
            "a": torch.full((2,), 0.7, dtype=torch.float64),
            "b": torch.full((3,), -0.4, dtype=torch.float64),
        }
        for grads in (both, {"a": both["a"], "b": None}, both):
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
            if grads["b"] is None:
                assert updates["b"] is None
        # The leaf that missed one gradient is where two plain steps lead.
        alone = {"b": torch.ones(3, dtype=torch.float64)}
        alone_state = optimizer.init(alone)
        for _ in range(2):
            updates, alone_state = optimizer.update(
                {"b": both["b"]}, alone_state, params=alone, inplace=False
            )
            alone = torchopt.apply_updates(alone, updates, inplace=False)
        torch.testing.assert_close(params["b"], alone["b"], **TOLERANCE)


@pytest.mark.parametrize("name", ["adamax", "radam"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("flat", [True, False])
def test_states_of_the_published_package_go_on(name: str, backend: str, flat: bool) -> None:
    # Those have one number for all leaves, `t`, and no counts.
    torchopt.alias.utils._set_use_chain_flat(flat)
    try:
        optimizer = with_backend(ROWS[name].functional(lr=0.1), backend if flat else "auto")
    finally:
        torchopt.alias.utils._set_use_chain_flat(True)
    params = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(3, dtype=torch.float64)}
    grads = {k: torch.full_like(v, 0.3) for k, v in params.items()}
    state = optimizer.init(params)
    for _ in range(7):
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
    assert type(state[0].t) is int
    assert state[0].t == 8
    published = (type(state[0])(*state[0][:3]), *state[1:])
    assert published[0].count is None
    for _ in range(2):
        expected, state = optimizer.update(grads, state, params=params, inplace=False)
        updates, published = optimizer.update(grads, published, params=params, inplace=False)
        for key in params:
            torch.testing.assert_close(updates[key], expected[key], rtol=1e-14, atol=0)
    assert published[0].t == 10
    # A leaf that misses a gradient now stays behind.
    gap = {"a": grads["a"], "b": None}
    _, published = optimizer.update(gap, published, params=params, inplace=False)
    counts = torchopt.pytree.tree_leaves(published[0].count)
    assert [int(c) for c in counts] == [10, 9]


def test_groups_do_not_share_a_first_step() -> None:
    p, q = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torchopt.SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.add_param_group([q])
    p.grad = torch.ones_like(p)
    q.grad = torch.ones_like(q)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full_like(p, -0.1), rtol=0, atol=1e-15)
    torch.testing.assert_close(q.detach(), torch.full_like(q, -0.1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_in_place_steps_write_into_parameters_and_moments(name: str) -> None:
    row = ROWS[name]
    optimizer = row.functional(**row.settings[-1])
    params = {"w": torch.ones(3, dtype=torch.float64)}
    state = optimizer.init(params)
    g = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    kept = g.clone()
    updates, new_state = optimizer.update({"w": g}, state, params=params, inplace=True)
    torchopt.apply_updates(params, updates, inplace=True)
    # ADOPT's first gradient only sets its second moment.
    updates, new_state = optimizer.update({"w": g}, new_state, params=params, inplace=True)
    stepped = torchopt.apply_updates(params, updates, inplace=True)
    assert stepped["w"] is params["w"]
    assert not torch.equal(stepped["w"], torch.ones(3, dtype=torch.float64))
    for old, new in zip(state, new_state):
        for field in getattr(old, "_fields", ()):
            if field in ("mu", "nu", "trace", "sum_of_squares"):
                assert getattr(old, field)[0] is getattr(new, field)[0], field
    assert torch.equal(g, kept)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_functional_steps_leave_their_inputs_untouched(name: str) -> None:
    row = ROWS[name]
    optimizer = row.functional(**row.settings[-1])
    params = {"w": torch.ones(3, dtype=torch.float64)}
    g = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    _, state = optimizer.update({"w": g}, optimizer.init(params), params=params, inplace=False)
    tensors = [
        x
        for member in state
        for field in member
        for x in (field if isinstance(field, list) else ())
        if isinstance(x, Tensor)
    ]
    kept = [(x, x.clone(), x._version) for x in (*tensors, params["w"], g)]
    optimizer.update({"w": g}, state, params=params, inplace=False)
    for x, before, version in kept:
        assert torch.equal(x, before)
        assert x._version == version
