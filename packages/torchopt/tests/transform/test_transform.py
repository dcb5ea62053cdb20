# SPDX-License-Identifier: Apache-2.0
"""Chains, masks, clipping, hooks, validation: everything about transformations but their
formulas."""

from __future__ import annotations

import inspect
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optimizers import ROWS
from torch import nn

import torchopt
from torchopt.base import EmptyState, identity
from torchopt.transform import MaskedState, add_decayed_weights, masked, scale, trace


def ones(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2, dtype=torch.float64) for name in names}


def test_chain_flattens_drops_identities_and_threads_updates() -> None:
    inner = torchopt.chain(scale(2.0), identity())
    chained = torchopt.chain(inner, scale(3.0))
    assert len(chained.transformations) == 2
    assert torchopt.chain() == identity()
    single = scale(2.0)
    assert torchopt.chain(single) is single
    updates, state = chained.update(ones("a"), chained.init(ones("a")), inplace=False)
    assert updates["a"].tolist() == [6.0, 6.0]
    assert state == (EmptyState(), EmptyState())
    assert single.chain(scale(3.0)).transformations[0] == single


def test_chain_refuses_a_state_of_another_length() -> None:
    for combine in (torchopt.chain, torchopt.chain.flat):
        chained = combine(scale(2.0), scale(3.0))
        with pytest.raises(ValueError, match="number of updates and states has to be the same"):
            chained.update(ones("a"), (EmptyState(),))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_flat_and_tree_chains_agree(name: str) -> None:
    row = ROWS[name]
    params = {"x": [torch.ones(2), torch.full((1,), 2.0)], "y": torch.ones(())}
    grads = {"x": [torch.full((2,), 0.3), None], "y": torch.tensor(-0.2)}
    results = []
    for flat in (True, False):
        torchopt.alias.utils._set_use_chain_flat(flat)
        try:
            optimizer = row.functional(**row.settings[-1])
        finally:
            torchopt.alias.utils._set_use_chain_flat(True)
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(grads, state, params=params, inplace=False)
        results.append(updates)
    torch.testing.assert_close(results[0]["x"][0], results[1]["x"][0])
    assert results[0]["x"][1] is None
    assert results[1]["x"][1] is None
    torch.testing.assert_close(results[0]["y"], results[1]["y"])


@pytest.mark.parametrize("name", sorted(ROWS))
def test_optimizers_can_be_pickled(name: str) -> None:
    row = ROWS[name]
    optimizer = row.functional(**row.settings[-1])
    again = pickle.loads(pickle.dumps(optimizer))
    params = ones("a", "b")
    for _ in range(2):
        expected, _ = optimizer.update(params, optimizer.init(params), params=params, inplace=False)
        got, _ = again.update(params, again.init(params), params=params, inplace=False)
        assert torch.equal(got["a"], expected["a"])


@pytest.mark.parametrize(
    "mask",
    [
        {"w": True, "b": False},
        lambda params: {name: p.ndim > 1 for name, p in params.items()},
    ],
)
def test_adamw_decays_where_the_mask_says(mask: object) -> None:
    params = {"w": torch.ones(2, 2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    grads = {"w": torch.zeros(2, 2, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    optimizer = torchopt.adamw(0.1, weight_decay=0.5, mask=mask)
    state = optimizer.init(params)
    assert isinstance(state[1], MaskedState)
    updates, _ = optimizer.update(grads, state, params=params, inplace=False)
    assert updates["b"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(updates["w"], torch.full_like(params["w"], -0.05))


def test_mask_may_be_a_prefix() -> None:
    params = {"head": ones("w", "b"), "body": ones("w", "b")}
    transformation = masked(trace(0.9), {"head": True, "body": False})
    state = transformation.init(params)
    for _ in range(2):
        updates, state = transformation.update(params, state, inplace=False)
    assert updates["body"]["w"].tolist() == [1.0, 1.0]
    assert updates["head"]["w"].tolist() == [1.9, 1.9]


def test_bad_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a prefix of the tree of parameters"):
        masked(scale(0.0), {"a": True, "c": False}).init(ones("a", "b"))
    with pytest.raises(TypeError, match="expected a tree of bools"):
        masked(scale(0.0), {"a": 1.0, "b": True}).init(ones("a", "b"))


def test_clipping_scales_to_the_norm() -> None:
    grads = {"a": torch.tensor([3.0]), "b": None, "c": torch.tensor([[-4.0]])}
    for norm_type, norm in ((2.0, 5.0), (1.0, 7.0), (0.0, 2.0), (math.inf, 4.0), ("inf", 4.0)):
        clip = torchopt.clip_grad_norm(1.0, norm_type)
        updates, _ = clip.update(grads, clip.init(grads))
        torch.testing.assert_close(updates["a"], torch.tensor([3.0 / (norm + 1e-6)]))
        assert updates["b"] is None
    clip = torchopt.clip_grad_norm(100.0)
    assert torch.equal(clip.update(grads, clip.init(grads))[0]["a"], grads["a"])
    assert clip.update((), clip.init(()))[0] == ()
    strict = torchopt.clip_grad_norm(1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="The total norm of order 2.0 for gradients"):
        strict.update([torch.tensor(float("nan"))], EmptyState())


@pytest.mark.parametrize("norm_type", [0.0, -1.0, 0.5, 1.0, 2.0, 3.0, math.inf])
def test_clipping_works_under_vmap(norm_type: float) -> None:
    clip = torchopt.clip_grad_norm(1.0, norm_type)
    batch = {
        "a": torch.tensor([[3.0, 4.0], [0.3, 0.4], [-700.0, 0.0]]),
        "b": torch.tensor([[-5.0], [0.02], [90.0]]),
    }

    def clipped(grads: Any) -> Any:
        return clip.update(grads, EmptyState(), inplace=False)[0]

    got = torch.func.vmap(clipped)(batch)
    for i in range(3):
        leaves = [nn.Parameter(torch.zeros_like(x[i])) for x in batch.values()]
        for leaf, x in zip(leaves, batch.values()):
            leaf.grad = x[i].clone()
        nn.utils.clip_grad_norm_(leaves, 1.0, norm_type)
        for x, leaf in zip(got.values(), leaves):
            torch.testing.assert_close(x[i], leaf.grad, rtol=1e-5, atol=0)


def test_the_hook_for_nan_leaves_finite_gradients() -> None:
    largest = torch.finfo(torch.float64).max
    g = torch.tensor([math.nan, math.inf, -math.inf, 2.0], dtype=torch.float64)
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    y = 0.5 * x
    y.register_hook(torchopt.hook.zero_nan_hook)
    y.backward(g)
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, largest / 2, -largest / 2, 1.0]


def test_hooks_are_on_the_gradients() -> None:
    hook = torchopt.hook.zero_nan_hook
    transformation = torchopt.register_hook(hook)
    g = torch.ones(1, requires_grad=True) * 2
    (same,), _ = transformation.update((g,), transformation.init((g,)))
    assert same is g
    assert next(iter(g._backward_hooks.values())) is hook
    assert torch.equal(
        torchopt.hook.nan_to_num_hook(1.0, 2.0, 3.0)(torch.tensor([math.nan, math.inf, -math.inf])),
        torch.tensor([1.0, 2.0, 3.0]),
    )


@pytest.mark.parametrize("graph", [True, False])
def test_a_step_without_a_graph_has_no_hooks(graph: bool) -> None:
    """Evaluation under no_grad and first-order steps take the same optimizer."""
    net = torch.nn.Linear(2, 1)
    impl = torchopt.chain(torchopt.register_hook(lambda g: 2 * g), torchopt.sgd(0.1))
    optimizer = torchopt.MetaOptimizer(net, impl, first_order=graph)
    weight = net.weight.detach().clone()
    loss = (net(torch.ones(1, 2)) ** 2).sum()
    (expected,) = torch.autograd.grad(loss, net.weight, retain_graph=True)
    with torch.set_grad_enabled(graph):
        optimizer.step(loss)
    torch.testing.assert_close(net.weight.detach(), weight - 0.1 * expected)


@pytest.mark.parametrize("keep", ["all", "steps", 1])
def test_hooks_act_in_recomputed_steps_too(keep: Any) -> None:
    impl = torchopt.chain(torchopt.register_hook(lambda g: 2 * g), torchopt.sgd(0.1))
    w = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    inner = torchopt.inner_loop(lambda w, batch: (w**2).sum() / 2, impl, steps=2, keep=keep)
    # w' = w - 0.1 g: the factor of a step is 1 - 0.1 H, and the hook doubles what goes through g.
    torch.testing.assert_close(
        torch.autograd.grad(inner(w).params.sum(), w)[0], torch.full_like(w, 0.8**2)
    )


@pytest.mark.filterwarnings("ignore:inner_loop. derivative=.forward.:UserWarning")
@pytest.mark.parametrize("way", ["inner_loop", "jvp"])
def test_forward_mode_sees_no_hooks_and_is_refused(way: str) -> None:
    impl = torchopt.chain(torchopt.register_hook(lambda g: 2 * g), torchopt.sgd(0.1))
    w = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)

    def step(w: torch.Tensor) -> torch.Tensor:
        return impl.update(w, impl.init(w), params=w, inplace=False)[0]

    def forward(w: torch.Tensor) -> object:
        if way == "jvp":
            return torch.func.jvp(step, (w.detach(),), (torch.ones_like(w),))
        loss = lambda w, batch: (w**2).sum() / 2  # noqa: E731 - short
        return torchopt.inner_loop(loss, impl, steps=2, derivative="forward")(w)

    with pytest.raises(torchopt.errors.NotDifferentiableError, match="hooks see, got forward mode"):
        forward(w)


def test_nan_to_num() -> None:
    clean = torchopt.nan_to_num(0.5, 1.0, -1.0)
    g = {"a": torch.tensor([math.nan, math.inf, -math.inf, 2.0]), "b": None}
    updates, _ = clean.update(g, clean.init(g))
    assert updates["a"].tolist() == [0.5, 1.0, -1.0, 2.0]
    assert updates["b"] is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torchopt.sgd(-1.0), "Invalid learning rate: -1.0"),
        (lambda: torchopt.sgd(0.1, momentum=-0.1), "Invalid momentum value: -0.1"),
        (
            lambda: torchopt.sgd(0.1, nesterov=True),
            "Nesterov momentum requires a momentum and zero",
        ),
        (lambda: torchopt.sgd(0.1, 0.9, 0.5, nesterov=True), "Nesterov momentum requires"),
        (lambda: torchopt.sgd(0.1, weight_decay=-1.0), "Invalid weight_decay value: -1.0"),
        (lambda: torchopt.adam(eps=-1.0), "Invalid epsilon value: -1.0"),
        (lambda: torchopt.adam(betas=(1.0, 0.9)), "Invalid beta parameter at index 0: 1.0"),
        (lambda: torchopt.adamw(betas=(0.9, -0.1)), "Invalid beta parameter at index 1: -0.1"),
        (
            lambda: torchopt.adam(betas=(2, 0), use_accelerated_op=True),
            "Invalid beta parameter at index 0",
        ),
        (lambda: torchopt.rmsprop(alpha=-1.0), "Invalid alpha value: -1.0"),
        (lambda: torchopt.adadelta(rho=1.5), "Invalid rho value: 1.5"),
        (
            lambda: torchopt.transform.scale_by_adadelta(rho=1.5),
            "Invalid rho parameter at index 0: 1.5",
        ),
        (lambda: torchopt.adamax(betas=(0.9, 1.5)), "Invalid b1 parameter at index 0: 1.5"),
        (lambda: torchopt.radam(betas=(-0.1, 0.9)), "Invalid b1 parameter at index 0: -0.1"),
        (lambda: torchopt.adagrad(lr_decay=-1.0), "Invalid lr_decay value: -1.0"),
        (
            lambda: torchopt.adagrad(initial_accumulator_value=-1.0),
            "Invalid initial_accumulator_value value: -1.0",
        ),
        (
            lambda: torchopt.transform.apply_if_finite(torchopt.sgd(0.1), max_failures=-1),
            "apply_if_finite: expected max_failures >= 0, got -1",
        ),
    ],
)
def test_hyper_parameters_are_validated(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# Any number will do, in torch.optim or in the published package as well.
UNCHECKED = {
    ("sgd", "dampening"),
    ("rmsprop", "initial_scale"),
    ("asgd", "t0"),
    ("muon", "ns_coefficients"),
}


def numbers_of(make: Callable[..., Any]) -> dict[str, Any]:
    """Return the hyper-parameters that are numbers or tuples with some, and their defaults."""
    values = {
        name: 0.1 if parameter.default is inspect.Parameter.empty else parameter.default
        for name, parameter in inspect.signature(make).parameters.items()
    }
    return {k: v for k, v in values.items() if type(v) in (int, float, tuple)}


@pytest.mark.parametrize("bad", [-1.0, math.nan])
@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_number_out_of_range_is_refused(name: str, bad: float) -> None:
    row = ROWS[name]
    defaults = numbers_of(row.functional)
    assert "lr" in defaults
    for key, value in defaults.items():
        if (name, key) in UNCHECKED or (key == "beta2_decay" and bad == -1.0):
            continue
        wrong = (
            [
                tuple(bad if i == k else x for i, x in enumerate(value))
                for k, old in enumerate(value)
                if old is not None
            ]
            if isinstance(value, tuple)
            else [bad]
        )
        for one in wrong:
            settings = {"lr": 0.1, key: one}
            for make in (
                row.functional,
                lambda **s: row.classic([torch.ones(2)], **s),
                lambda **s: row.meta(torch.nn.Linear(1, 1), **s),
            ):
                with pytest.raises(ValueError, match=r"^Invalid|^Nesterov"):
                    make(**settings)


def test_weight_decay_needs_parameters() -> None:
    for optimizer in (
        torchopt.sgd(0.1, weight_decay=0.1),
        add_decayed_weights(0.1),
        torchopt.adamw(),
    ):
        with pytest.raises(AssertionError, match="Parameters are required for weight decay"):
            optimizer.update(ones("a"), optimizer.init(ones("a")))


def test_mismatched_trees_are_refused() -> None:
    with pytest.raises(ValueError, match=r"apply_updates\(params, updates\): expected a tree like"):
        torchopt.apply_updates([torch.ones(1)], (torch.ones(1),))
    optimizer = torchopt.adam()
    state = optimizer.init(ones("a", "b"))
    with pytest.raises(ValueError, match="expected a state for 1 leaves, its field `mu` has 2"):
        optimizer.update(ones("a"), state)
    decayed = torchopt.sgd(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="params=params"):
        decayed.update(ones("a"), decayed.init(ones("a")), params=ones("b"))


def test_in_place_updates_are_seen_by_autograd() -> None:
    p = torch.ones(2, requires_grad=True)
    loss = (p * p).sum()
    torchopt.apply_updates([p], [torch.ones(2)], inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_applied_updates_are_not_kept_for_the_derivative() -> None:
    p, scale = torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    frozen, narrow = torch.ones(2), torch.ones(1, dtype=torch.float32)
    q = p * 1.0
    updates = {"a": scale.square() * p.sin(), "b": torch.ones(2), "c": scale.double().reshape(1)}
    params = {"a": q, "b": frozen, "c": narrow}
    stepped = torchopt.apply_updates(params, updates, inplace=False)
    watched = [weakref.ref(params.pop("a")), weakref.ref(updates.pop("a"))]
    del q
    assert [ref() for ref in watched] == [None, None]
    assert not stepped["b"].requires_grad
    assert stepped["c"].dtype is torch.float64
    # d/dp of p + s^2 sin(p), its derivative in s, and the second one.
    (slope,) = torch.autograd.grad(stepped["a"].sum(), p, create_graph=True)
    torch.testing.assert_close(slope, 1 + 4.0 * p.cos())
    (mixed,) = torch.autograd.grad(slope.sum(), scale, create_graph=True)
    torch.testing.assert_close(mixed, 4.0 * p.cos().sum())
    (wide,) = torch.autograd.grad(stepped["c"].sum(), scale)
    assert wide == 1.0


def test_learning_rate_tensors_and_schedules_are_differentiable() -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    for optimizer in (torchopt.sgd(lr), torchopt.sgd(lambda count: lr / (1 + count))):
        updates, _ = optimizer.update(
            torch.tensor(3.0), optimizer.init(torch.tensor(0.0)), inplace=False
        )
        assert torch.autograd.grad(updates, lr)[0].item() == pytest.approx(-3.0)


def test_requiring_gradients_of_moments_does_not_break_in_place_steps() -> None:
    optimizer = torchopt.adam(0.1, moment_requires_grad=True)
    params = ones("a")
    state = optimizer.init(params)
    assert state[0].mu[0].requires_grad
    updates, state = optimizer.update(ones("a"), state, params=params, inplace=True)
    assert updates["a"].detach().tolist() == pytest.approx([-0.1, -0.1])


def test_norms_of_tensors_without_values_are_not_read() -> None:
    """A tensor on the meta device has a shape and a dtype only."""
    grads = {"w": torch.empty(3, device="meta"), "b": torch.empty(2, 2, device="meta")}
    for order in (1.0, 2.0, math.inf):
        clip = torchopt.clip.clip_grad_norm(1.0, order)
        clipped, _ = clip.update(grads, clip.init(grads), inplace=False)
        assert [(x.device.type, x.shape) for x in clipped.values()] == [
            ("meta", (3,)),
            ("meta", (2, 2)),
        ]


@pytest.mark.parametrize("make", [torchopt.sgd, torchopt.adam])
def test_a_schedule_of_several_numbers_is_refused_by_name(make: Any) -> None:
    impl, w = make(lambda count: torch.tensor([0.1, 0.2, 0.3])), torch.ones(3)
    with pytest.raises(ValueError, match="lr: expected a number or a real tensor with one element"):
        impl.update(w, impl.init(w), params=w, inplace=False)
