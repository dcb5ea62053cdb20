# SPDX-License-Identifier: Apache-2.0
"""Wrappers around transformations, and clipping."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optimizers import ROWS
from torch import Tensor

import torchopt
from torchopt.base import EmptyState, GradientTransformation
from torchopt.clip import adaptive_clip, clip_by_value, clip_each_norm, clip_grad_norm
from torchopt.optimizers.native import with_backend
from torchopt.transform import (
    accumulate,
    apply_if_finite,
    centralize,
    ema,
    freeze,
    in_precision,
    inject_hyperparams,
    lookahead,
    masked,
    partition,
    scale,
)

DOUBLE = torch.float64


def tree() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    return {
        "body": [
            torch.randn(2, 3, generator=generator, dtype=DOUBLE),
            torch.randn(2, generator=generator, dtype=DOUBLE),
        ],
        "head": torch.randn(3, generator=generator, dtype=DOUBLE),
    }


def run(optimizer: Any, params: Any, grads: Any, steps: int, inplace: bool = False) -> Any:
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


def test_partition_is_each_transformation_on_its_part() -> None:
    params, grads = tree(), tree()
    for wrap in (lambda x: x, lambda x: torchopt.chain.flat(torchopt.clip_grad_norm(1e9), x)):
        optimizer = wrap(
            partition(
                {
                    "a": torchopt.adam(0.1, weight_decay=0.1),
                    "s": torchopt.sgd(0.2, 0.9),
                    "no": freeze(),
                },
                {"body": ["a", "no"], "head": "s"},
            )
        )
        got = run(optimizer, params, grads, 3)
        part, grad = {"x": params["body"][0]}, {"x": grads["body"][0]}
        expected = run(torchopt.adam(0.1, weight_decay=0.1), part, grad, 3)["x"]
        assert torch.equal(got["body"][0], expected)
        assert torch.equal(
            got["head"], run(torchopt.sgd(0.2, 0.9), params["head"], grads["head"], 3)
        )
        assert got["body"][1] is params["body"][1]
    by_function = partition(
        {"a": torchopt.sgd(0.1), "b": torchopt.sgd(1.0)},
        lambda p: torchopt.pytree.tree_map(lambda x: "a" if x.ndim > 1 else "b", p),
    )
    got = run(pickled_labels(), params, grads, 1)
    assert torch.equal(got["head"], run(by_function, params, grads, 1)["head"])
    with pytest.raises(ValueError, match=r"expected one of the labels \['a'\], got 'z'"):
        partition({"a": torchopt.sgd(0.1)}, {"body": "z", "head": "a"}).init(params)


def pickled_labels() -> Any:
    labels = {"body": ["a", "b"], "head": "b"}
    optimizer = partition({"a": torchopt.sgd(0.1), "b": torchopt.sgd(1.0)}, labels)
    return pickle.loads(pickle.dumps(optimizer))


def test_frozen_parameters_and_their_state_stay() -> None:
    params, grads = tree(), tree()
    optimizer = torchopt.chain(freeze({"body": [True, False], "head": False}), torchopt.adam(0.1))
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params=params, inplace=False)
    assert updates["body"][0] is None
    alone = run(torchopt.adam(0.1), params["head"], grads["head"], 1)
    assert torch.equal(params["head"] + updates["head"], alone)
    assert [c.item() for c in state[1][0].count] == [0, 1, 1]
    with pytest.raises(TypeError, match=r"freeze\(mask\): expected a tree of bools"):
        freeze({"body": 1, "head": False}).init(params)


MASK = {"w": True, "b": False}
SEES_TREES = {
    "freeze": lambda: freeze(MASK),
    "masked": lambda: masked(scale(0.5), MASK),
    "partition": lambda: partition(
        {"fast": scale(3.0), "slow": scale(0.5)}, {"w": "slow", "b": "fast"}
    ),
}


@pytest.mark.parametrize("name", SEES_TREES)
def test_a_flat_chain_hands_the_tree_to_masks(name: str) -> None:
    params = {"w": torch.tensor([2.0, 4.0]), "b": torch.tensor([6.0])}
    found = []
    for make in (torchopt.chain, torchopt.chain.flat):
        t = make(SEES_TREES[name](), torchopt.sgd(1.0))
        updates, _ = t.update(params, t.init(params), params=params, inplace=False)
        found.append({k: u if u is None else u.tolist() for k, u in updates.items()})
    assert found[0] == found[1]
    assert found[0]["w"] == (None if name == "freeze" else [-1.0, -2.0])
    assert found[0]["b"] == ([-18.0] if name == "partition" else [-6.0])


@pytest.mark.parametrize("inplace", [False, True])
def test_accumulating_equals_one_step_with_the_mean(inplace: bool) -> None:
    params = tree()
    parts = [torchopt.pytree.tree_map(lambda x, i=i: x * i, tree()) for i in (1.0, 2.0, 6.0)]
    optimizer = accumulate(torchopt.adam(0.1), 3)
    state = optimizer.init(params)
    stepped = params
    for _ in range(2):
        for grads in parts:
            updates, state = optimizer.update(grads, state, params=stepped, inplace=inplace)
            stepped = torchopt.apply_updates(stepped, updates, inplace=False)
    mean = torchopt.pytree.tree_map(lambda x: x * 3.0, tree())
    expected = run(torchopt.adam(0.1), params, mean, 2)
    torch.testing.assert_close(stepped["head"], expected["head"], rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(stepped["body"], expected["body"], rtol=1e-13, atol=1e-14)
    optimizer = accumulate(torchopt.sgd(1.0), 2)
    state = optimizer.init((params["head"], params["head"]))
    one = torch.ones(3, dtype=DOUBLE)
    for grads in ((one, None), (None, None)):
        updates, state = optimizer.update(grads, state, inplace=False)
    assert updates[0].tolist() == [-0.5] * 3
    assert updates[1] is None
    with pytest.raises(ValueError, match="Invalid every value: 0; expected an integer >= 1"):
        accumulate(torchopt.sgd(0.1), 0)


@pytest.mark.parametrize("inplace", [False, True])
def test_lookahead_by_hand(inplace: bool) -> None:
    # Constant gradient 1, fast steps of 0.1: after k = 2 steps fast = p - 0.2, slow = p - 0.1.
    optimizer = lookahead(torchopt.sgd(0.1), every=2, alpha=0.5)
    params = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    values = []
    state = optimizer.init(params)
    for _ in range(4):
        grad = torch.ones(2, dtype=DOUBLE)
        updates, state = optimizer.update(grad, state, params=params, inplace=inplace)
        params = torchopt.apply_updates(params, updates, inplace=inplace)
        values.append(params[0].item())
    assert values == pytest.approx([0.9, 0.9, 0.8, 0.8], rel=1e-14)
    alpha = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    end = run(lookahead(torchopt.sgd(0.1), 2, alpha), params, torch.ones(2, dtype=DOUBLE), 2)
    assert torch.autograd.grad(end.sum(), alpha)[0].item() == pytest.approx(-0.4, rel=1e-13)
    with pytest.raises(AssertionError, match="Parameters are required for lookahead"):
        optimizer.update(params, optimizer.init(params))


@pytest.mark.parametrize("inplace", [True, False])
def test_lookahead_leaves_integers_alone(inplace: bool) -> None:
    optimizer = lookahead(torchopt.sgd(0.1), every=2, alpha=0.5)
    params = {"w": torch.zeros(2, dtype=DOUBLE), "count": torch.tensor(3)}
    state = optimizer.init(params)
    for _ in range(4):
        grads = {"w": torch.ones(2, dtype=DOUBLE), "count": None}
        updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
        params = torchopt.apply_updates(params, updates, inplace=inplace)
    torch.testing.assert_close(params["w"], torch.full((2,), -0.2, dtype=DOUBLE))
    assert torch.equal(params["count"], torch.tensor(3))
    assert torch.equal(state.slow["count"], torch.tensor(3))


def test_ema_equals_the_weighted_sum() -> None:
    grads = [torch.tensor(float(i), dtype=DOUBLE) for i in (1, 5, -2)]
    optimizer = ema(0.9)
    state = optimizer.init(grads[0])
    for g in grads:
        updates, state = optimizer.update(g, state, inplace=False)
    weights = [0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    expected = sum(w * g.item() for w, g in zip(weights, grads)) / sum(weights)
    assert updates.item() == pytest.approx(expected, rel=1e-14)


def test_centralized_gradients_have_mean_zero() -> None:
    grads = tree()
    updates, _ = centralize().update(grads, EmptyState(), inplace=False)
    weight = grads["body"][0]
    torch.testing.assert_close(updates["body"][0], weight - weight.mean(1, keepdim=True))
    assert updates["body"][0].mean(1).abs().max() < 1e-15
    assert torch.equal(updates["head"], grads["head"])


def test_steps_that_are_not_finite_are_skipped() -> None:
    params, grads = tree(), tree()
    bad = torchopt.pytree.tree_map(torch.clone, grads)
    bad["head"][1] = math.nan
    optimizer = apply_if_finite(torchopt.adam(0.1), max_failures=2)
    state = optimizer.init(params)
    stepped = params
    for g in (grads, bad, bad, grads):
        updates, state = optimizer.update(g, state, params=stepped, inplace=False)
        stepped = torchopt.apply_updates(stepped, updates, inplace=False)
    assert (state.failures, state.total) == (0, 2)
    assert torch.equal(stepped["head"], run(torchopt.adam(0.1), params, grads, 2)["head"])
    for _ in range(2):
        _, state = optimizer.update(bad, state, params=params, inplace=False)
    with pytest.raises(FloatingPointError, match="gradients of 3 steps in a row"):
        optimizer.update(bad, state, params=params, inplace=False)


def test_finite_sparse_gradients_are_read_as_they_are_stored() -> None:
    indices = torch.tensor([[1, 1, 2**40], [0, 0, 1]])  # of a tensor too large to be dense
    values = torch.tensor([1.0, 2.0, 3.0])
    optimizer = apply_if_finite(torchopt.transform.scale(-1.0))
    state = optimizer.init(())
    for bad in (1.0, math.nan, -math.inf):
        given = indices, values * bad, (2**50, 2)
        whole = torch.sparse_coo_tensor(*given, check_invariants=False)
        updates, state = optimizer.update((whole,), state)
        if math.isfinite(bad):
            assert torch.equal(updates[0].coalesce().values(), torch.tensor([-3.0, -3.0]))
        else:
            assert updates == (None,)
    assert (state.failures, state.total) == (2, 2)


def test_injected_hyper_parameters_are_learnable() -> None:
    make = inject_hyperparams(torchopt.adam)
    params, grads = tree()["head"], tree()["head"]
    optimizer = make(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    plain = torchopt.adam(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    assert set(optimizer.init(params).hyperparams) == {"lr", "betas", "eps", "weight_decay"}
    torch.testing.assert_close(
        run(optimizer, params, grads, 3), run(plain, params, grads, 3), rtol=1e-13, atol=1e-14
    )

    def end(lr: Tensor, b1: Tensor, b2: Tensor, eps: Tensor, wd: Tensor) -> Tensor:
        state = optimizer.init(params)
        hyper = {"lr": lr, "betas": (b1, b2), "eps": eps, "weight_decay": wd}
        state = state._replace(hyperparams=hyper)
        p = params
        for _ in range(3):
            updates, state = optimizer.update(grads * p, state, params=p, inplace=False)
            p = p + updates
        return p

    values = [torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (0.1, 0.8, 0.9, 1e-3, 0.1)]
    assert torch.autograd.gradcheck(end, values)
    again = pickle.loads(pickle.dumps(optimizer))
    assert torch.equal(run(again, params, grads, 2), run(optimizer, params, grads, 2))
    with pytest.raises(ValueError, match="Invalid learning rate: -1.0"):
        make(lr=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        make(learning_rate=0.1)


def test_what_is_injected_is_named_by_the_call() -> None:
    def by_keyword(**options: Any) -> GradientTransformation:
        return torchopt.adam(**options)

    params = (torch.ones(2, dtype=DOUBLE),)
    for make, static, options, expected in (
        (by_keyword, (), {"lr": 0.5, "eps": 0.25}, {"lr", "eps"}),
        (torchopt.adam, "lr", {"lr": 0.5, "eps": 0.25}, {"eps"}),
        (torchopt.adam, (), {"lr": np.float32(0.5), "eps": 0.25}, {"lr", "eps"}),
    ):
        optimizer = inject_hyperparams(make, static=static)(**options)
        state = optimizer.init(params)
        assert set(state.hyperparams) == expected
        updates, _ = optimizer.update(params, state, params=params, inplace=False)
        torch.testing.assert_close(updates[0], params[0] * (-0.5 / 1.25), rtol=1e-14, atol=0.0)


def test_injected_schedules_are_seen_in_the_state() -> None:
    optimizer = inject_hyperparams(torchopt.sgd)(torchopt.schedule.linear_schedule(1.0, 0.0, 4))
    p = torch.zeros((), dtype=DOUBLE)
    state = optimizer.init(p)
    seen = []
    for _ in range(3):
        updates, state = optimizer.update(torch.ones((), dtype=DOUBLE), state, inplace=False)
        seen.append((state.hyperparams["lr"].item(), updates.item()))
    assert seen == [(1.0, -1.0), (0.75, -0.75), (0.5, -0.5)]


def test_learning_rates_for_each_parameter_are_learned() -> None:
    # Meta-SGD: a learning rate for each number, trained by the loss after one inner step.
    target = torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE)
    curvature = torch.tensor([1.0, 4.0, 0.5], dtype=DOUBLE)
    rates = torch.full((3,), 0.1, dtype=DOUBLE, requires_grad=True)
    outer = torchopt.Adam([rates], lr=0.05)
    for _ in range(400):
        w = torch.zeros(3, dtype=DOUBLE, requires_grad=True)
        (g,) = torch.autograd.grad((curvature * (w - target) ** 2).sum() / 2, w, create_graph=True)
        sgd = torchopt.sgd(1.0)
        (step,), _ = sgd.update((rates * g,), sgd.init((w,)), inplace=False)
        loss = ((w + step - target) ** 2).sum()
        outer.zero_grad()
        loss.backward()
        outer.step()
    # The best rate for each number is one over its curvature: the step lands on the target.
    torch.testing.assert_close(rates.detach(), 1 / curvature, rtol=1e-8, atol=0)


def test_bfloat16_parameters_with_float32_moments() -> None:
    params, grads = (torch.ones(4, dtype=torch.bfloat16),), (torch.full((4,), 0.3),)
    low = (grads[0].bfloat16(),)
    optimizer = in_precision(torchopt.adam(0.1, weight_decay=0.1))
    state = optimizer.init(params)
    plain = torchopt.adam(0.1, weight_decay=0.1)
    plain_params = (torch.ones(4),)
    plain_state = plain.init(plain_params)
    updates, state = optimizer.update(low, state, params=params)
    expected, plain_state = plain.update((low[0].float(),), plain_state, params=plain_params)
    assert updates[0].dtype is torch.bfloat16
    assert torch.equal(updates[0], expected[0].bfloat16())
    assert state[1].nu[0].dtype is torch.float32
    assert torch.equal(state[1].nu[0], plain_state[1].nu[0])
    with pytest.raises(TypeError, match="expected a floating-point dtype, got torch.int64"):
        in_precision(plain, torch.int64)


def test_clip_by_value_and_by_the_norm_of_each_tensor() -> None:
    grads = {"a": torch.tensor([3.0, -4.0]), "b": None, "z": torch.zeros(2)}
    updates, _ = clip_by_value(3.5).update(grads, EmptyState(), inplace=False)
    assert updates["a"].tolist() == [3.0, -3.5]
    updates, _ = clip_each_norm(2.5).update(grads, EmptyState(), inplace=False)
    assert updates["a"].tolist() == pytest.approx([1.5, -2.0])
    assert updates["b"] is None
    assert updates["z"].tolist() == [0.0, 0.0]
    for make in (clip_by_value, clip_each_norm, adaptive_clip):
        with pytest.raises(ValueError, match=">= 0"):
            make(-1.0)


def test_adaptive_clip_is_unit_wise() -> None:
    p = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=DOUBLE)
    g = torch.tensor([[6.0, 8.0], [0.3, 0.4]], dtype=DOUBLE)
    u, _ = adaptive_clip(0.1, eps=1e-2).update(g, (), params=p, inplace=False)
    # Row norms of p: 5 and (at least) 0.01, so that the rows of u have norms 0.5 and 0.001.
    torch.testing.assert_close(u, torch.tensor([[0.3, 0.4], [6e-4, 8e-4]], dtype=DOUBLE))
    with pytest.raises(AssertionError, match="Parameters are required"):
        adaptive_clip().update(g, ())


def test_adaptive_clip_takes_the_outputs_of_a_convolution_as_units() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(4, 3, 2, 2, generator=generator, dtype=DOUBLE)
    g = torch.randn(4, 3, 2, 2, generator=generator, dtype=DOUBLE)
    g[1] *= 1e-3  # not clipped
    u, _ = adaptive_clip(0.1).update([g], (), params=[p], inplace=False)
    expected = []
    for unit, of_p in zip(g, p):
        largest = 0.1 * max(float(of_p.square().sum().sqrt()), 1e-3)
        expected.append(unit * min(1.0, largest / float(unit.square().sum().sqrt())))
    torch.testing.assert_close(u[0], torch.stack(expected))
    assert torch.equal(u[0][1], g[1])
    vector = torch.randn(6, generator=generator, dtype=DOUBLE)
    u, _ = adaptive_clip(0.1).update([vector], (), params=[torch.ones(6, dtype=DOUBLE)])
    torch.testing.assert_close(torch.linalg.norm(u[0]), torch.tensor(0.1 * 6**0.5, dtype=DOUBLE))


@pytest.mark.parametrize("norm", [2e-6, 1e-5, 1.0, 1.0 + 5e-7])
def test_global_clipping_is_torchs_to_the_last_digit(norm: float) -> None:
    """Small norms show the 1e-6 that is added to them, and that it is not added elsewhere."""
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(3, generator=generator, dtype=DOUBLE) for _ in range(2)]
    total = float(torch.linalg.vector_norm(torch.cat(grads)))
    grads = [g * (norm / total) for g in grads]
    twins = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for twin, g in zip(twins, grads):
        twin.grad = g.clone()
    max_norm = 1.0 if norm > 0.5 else norm / 2
    torch.nn.utils.clip_grad_norm_(twins, max_norm)
    updates, _ = clip_grad_norm(max_norm).update(grads, ())
    for u, twin in zip(updates, twins):
        torch.testing.assert_close(u, twin.grad, rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_global_clipping_is_differentiated_on_request(norm_type: float) -> None:
    a = torch.tensor([1.0, -2.0], dtype=DOUBLE, requires_grad=True)
    b = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)

    def clipped(differentiable: bool) -> Any:
        clip = clip_grad_norm(1.0, norm_type, differentiable=differentiable)
        return lambda a, b: clip.update((a, b), (), inplace=False)[0]

    assert torch.autograd.gradcheck(clipped(True), (a, b))
    assert torch.autograd.gradgradcheck(clipped(True), (a, b))
    u, _ = clipped(False)(a, b)
    # A constant coefficient: the derivative of u_0 with respect to g_0 is the coefficient.
    coefficient = (u[0] / a[0]).item()
    assert torch.autograd.grad(u[0], a)[0].tolist() == pytest.approx([coefficient, 0.0])


def test_clipping_each_tensor_is_differentiable_also_at_zero() -> None:
    g = torch.tensor([[3.0, 4.0], [0.1, -0.2]], dtype=DOUBLE, requires_grad=True)
    p = torch.tensor([[1.0, 2.0], [0.5, 0.5]], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: clip_each_norm(1.0).update(g, ())[0], g)
    assert torch.autograd.gradgradcheck(lambda g: clip_each_norm(1.0).update(g, ())[0], g)
    assert torch.autograd.gradcheck(
        lambda g, p: adaptive_clip(0.5).update(g, (), params=p)[0], (g, p)
    )
    zero = torch.zeros(2, dtype=DOUBLE, requires_grad=True)
    (grad,) = torch.autograd.grad(
        clip_each_norm(1.0).update(zero, ())[0].sum(), zero, create_graph=True
    )
    assert grad.tolist() == [1.0, 1.0]


LABELS = {"a": "x", "b": "y", "c": "x"}
# Wrappers in the settings in which they are the identity.
NEUTRAL: dict[str, Callable[[Any], Any]] = {
    "accumulate": lambda make: accumulate(make(), 1),
    "finite": lambda make: apply_if_finite(make()),
    "lookahead": lambda make: lookahead(make(), 3, 1.0),
    "masked": lambda make: masked(make(), True),
    "partition": lambda make: partition({"x": make(), "y": make()}, LABELS),
}


def mixed_tree(seed: int, gaps: bool) -> Any:
    generator = torch.Generator().manual_seed(seed)
    values = [
        torch.randn(shape, generator=generator, dtype=DOUBLE).to(dtype)
        for shape, dtype in (((3, 2), DOUBLE), ((2,), DOUBLE), ((), DOUBLE), ((4,), torch.float32))
    ]
    missing = torch.rand(4, generator=generator) < 0.25
    a, b, c, d = (None if gaps and gone else x for x, gone in zip(values, missing.tolist()))
    return {"a": [a, b], "b": c, "c": d}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_neutral_wrappers_change_nothing(name: str) -> None:
    settings = ROWS[name].settings[-1]

    def make() -> Any:
        return ROWS[name].functional(**settings)

    def stepped(optimizer: Any, *, inplace: bool, reload: bool = False) -> list[Tensor]:
        params = mixed_tree(0, gaps=False)
        state = optimizer.init(params)
        for step in range(1, 9):
            grads = mixed_tree(step, gaps=True)
            updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
            params = torchopt.apply_updates(params, updates, inplace=inplace)
            if reload:
                state = pickle.loads(pickle.dumps(copy.deepcopy(state)))
        return torchopt.pytree.tree_leaves(params)

    expected = stepped(with_backend(make(), "reference"), inplace=False)
    results = {
        "in place": stepped(make(), inplace=True),
        "reloaded": stepped(make(), inplace=True, reload=True),
    }
    for wrapper, wrap in NEUTRAL.items():
        results[wrapper] = stepped(wrap(make), inplace=True)
    for wrapper, got in results.items():
        for x, y in zip(got, expected):
            tolerance = 1e-12 if x.dtype is DOUBLE else 1e-5
            torch.testing.assert_close(
                x, y, rtol=tolerance, atol=tolerance, msg=lambda m, w=wrapper: f"{w}: {m}"
            )
    start = torchopt.pytree.tree_leaves(mixed_tree(0, gaps=False))
    assert all((x - y).abs().max() > 1e-6 for x, y in zip(expected, start))


FLAT_ALONE: dict[str, Callable[[], Any]] = {
    "trace": lambda: torchopt.transform.trace(0.9),
    "ema": lambda: ema(0.9),
    "schedule": lambda: torchopt.transform.scale_by_schedule(lambda k: 1.0 / (1.0 + k.double())),
    "masked": lambda: masked(ema(0.5), [True, False]),
    "lookahead": lambda: lookahead(torchopt.adam(0.1), 2),
    "accumulate": lambda: accumulate(torchopt.adam(0.1), 2),
    "injected": lambda: inject_hyperparams(torchopt.adam)(lr=0.1),
    "flat": lambda: torchopt.chain.flat(torchopt.transform.scale_by_adam()),
    "chain": lambda: torchopt.chain(ema(0.9), torchopt.transform.scale_by_adam()),
}


@pytest.mark.parametrize("last", [torchopt.transform.scale(-1.0), masked(ema(0.5), [True, False])])
@pytest.mark.parametrize("name", FLAT_ALONE)
def test_a_flat_chain_of_one_is_a_member_of_a_chain_in_place(name: str, last: Any) -> None:
    """Its state is that of its only member, into which the chain writes."""
    results = []
    for chain in (torchopt.chain, torchopt.chain.flat):
        for inplace in (False, True):
            optimizer = chain(torchopt.chain.flat(FLAT_ALONE[name]()), last)
            params = [torch.ones(2, dtype=DOUBLE), torch.full((1,), 2.0, dtype=DOUBLE)]
            state = optimizer.init(params)
            for k in range(4):
                grads = [torch.cos(p) + k for p in params]
                updates, state = optimizer.update(grads, state, params=params, inplace=inplace)
                params = torchopt.apply_updates(params, updates, inplace=False)
            results.append(torch.cat(params))
    assert not torch.equal(results[0], torch.tensor([1.0, 1.0, 2.0], dtype=DOUBLE))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    "inner", [accumulate(torchopt.adam(0.1), 2), torchopt.transform.sam(torchopt.sgd(0.1))]
)
def test_a_step_by_an_earlier_gradient_keeps_the_dtype_of_the_parameters(inner: Any) -> None:
    """The second call has no gradient for the first leaf, and steps it nevertheless."""
    optimizer = in_precision(inner, DOUBLE)
    params: Any = [torch.ones(2), torch.ones(1)]
    state = optimizer.init(params)
    for grads in ([torch.ones(2), torch.ones(1)], [None, torch.ones(1)]):
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    assert [p.dtype for p in params] == [torch.float32, torch.float32]
    assert updates[0] is not None
    assert updates[0].abs().sum() > 0


def test_in_precision_takes_the_tuple_of_autograd_grad_for_a_list_of_parameters() -> None:
    """As `adam` itself does, also where the loss does not depend on a parameter."""
    params = [torch.ones(n, requires_grad=True) for n in (2, 3)]
    optimizer = in_precision(torchopt.adam(0.1), DOUBLE)
    state = optimizer.init(params)
    for used in (params, params[1:]):
        loss = torch.stack([(p**2).sum() for p in used]).sum()
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        assert isinstance(updates, tuple)
        for update, grad in zip(updates, grads):
            assert (update is None) == (grad is None)
            if update is not None:
                assert update.dtype == torch.float32
                torch.testing.assert_close(update, torch.full_like(update, -0.1))


def test_accumulate_takes_the_tuple_of_autograd_grad_for_a_list_of_parameters() -> None:
    params = [torch.ones(2), torch.ones(3)]
    optimizer = accumulate(torchopt.sgd(0.5), every=2)
    state = optimizer.init(params)
    for size in (1.0, 2.0, 3.0, 5.0):
        grads = (torch.full((2,), size), None if size == 2.0 else torch.full((3,), size))
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        assert isinstance(updates, tuple)
        if size in (1.0, 3.0):
            assert updates == (None, None)
    torch.testing.assert_close(updates, (torch.full((2,), -2.0), torch.full((3,), -2.0)))


def test_sam_says_that_gradients_and_parameters_are_in_different_containers() -> None:
    params = [torch.ones(2), torch.ones(3)]
    optimizer = torchopt.transform.sam(torchopt.sgd(0.5))
    _, state = optimizer.update(tuple(params), optimizer.init(params), params=params, inplace=False)
    with pytest.raises(ValueError, match=r"expected updates like \[\*, \*\].*got tuple of 2"):
        optimizer.update(tuple(params), state, params=params, inplace=False)


@pytest.mark.parametrize(("last", "known"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("dtype", "size", "every"),
    [(torch.bfloat16, 1.0, 1024), (torch.float16, 2.0**-20, 512), (torch.float16, 3.0, 300)],
)
def test_accumulate_rounds_the_mean_of_half_types_once(
    dtype: torch.dtype, size: float, every: int, last: bool, known: bool
) -> None:
    """Shares of it in a half type would be lost: below the spacing of the mean, or of all."""
    optimizer = accumulate(torchopt.sgd(1.0), every)
    params = [torch.zeros(2, dtype=dtype)]
    grads = [torch.full((2,), size, dtype=dtype)]
    state = optimizer.init(params)
    for call in range(every):
        given = grads if last or call < every - 1 else [None]
        updates, state = optimizer.update(given, state, params=params if known else None)
    share = 1.0 if last else (every - 1) / every
    assert updates[0].dtype == dtype
    torch.testing.assert_close(
        updates[0], torch.full((2,), -size * share).to(dtype), rtol=0, atol=0
    )
