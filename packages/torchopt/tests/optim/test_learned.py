# SPDX-License-Identifier: Apache-2.0
"""Learned optimizers: the rule against one written differently, derivatives, vmap, training."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import torchopt
from torchopt.diff.zero_order import unrolled
from torchopt.errors import MismatchError
from torchopt.optimizers.learned import (
    LearnedLSTMState,
    LearnedMLPState,
    learned_lstm,
    learned_mlp,
    lstm_weights,
    mlp_weights,
)
from torchopt.tree import tree_leaves

F64 = torch.float64
# Of the paper; weights that were trained with them fit no others.
DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
TIMES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


def weights_of(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "mlp":
        return mlp_weights((6,), generator=generator, dtype=F64)
    return lstm_weights(3, generator=generator, dtype=F64)


MAKE = {
    "mlp": lambda weights: learned_mlp(weights, step_scale=0.1, exponent_scale=0.3),
    "lstm": learned_lstm,
}
PARAMS = {"w": torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=F64), "b": torch.tensor(0.3).double()}


@pytest.fixture(params=MAKE)
def kind(request):
    return request.param


def steps(optimizer, params, gradients, n=3):
    state = optimizer.init(params)
    for k in range(n):
        found = {name: g * (k + 1) for name, g in gradients.items()}
        updates, state = optimizer.update(found, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    return params


def test_the_network_reads_the_statistics_of_its_coordinate():
    """One coordinate at a time, with Python's numbers."""
    weights = weights_of("mlp")
    gradients = [torch.tensor([0.5, -3.0], dtype=F64), torch.tensor([1.0, 0.2], dtype=F64)]
    params = torch.tensor([2.0, -1.0], dtype=F64)
    optimizer = MAKE["mlp"](weights)
    state = optimizer.init(params)
    momenta, second = [[0.0] * 6 for _ in range(2)], [0.0, 0.0]
    for t, g in enumerate(gradients, start=1):
        updates, state = optimizer.update(g, state, params=params)
        rows = []
        for i in range(2):
            gi = g[i].item()
            momenta[i] = [b * m + (1 - b) * gi for b, m in zip(DECAYS, momenta[i])]
            second[i] = 0.999 * second[i] + 0.001 * gi**2
            unbiased = [m / (1 - b**t) for b, m in zip(DECAYS, momenta[i])]
            root = math.sqrt(second[i] / (1 - 0.999**t) + 1e-16)
            rows.append(([gi, params[i].item(), root, 1 / root, *unbiased], root, unbiased))
        sizes = [math.sqrt(sum(r[0][j] ** 2 for r in rows) / 2 + 1e-16) for j in range(10)]
        for i, (sized, root, unbiased) in enumerate(rows):
            features = [x / s for x, s in zip(sized, sizes)] + [m / root for m in unbiased]
            features += [g[i].item() / root] + [math.tanh(t / s - 1) for s in TIMES]
            x = torch.tensor(features, dtype=F64)
            hidden = torch.relu(weights["w0"].T @ x + weights["b0"])
            d, m = weights["w1"].T @ hidden + weights["b1"]
            torch.testing.assert_close(updates[i], 0.1 * d * torch.exp(0.3 * m))


def test_the_recurrent_network_is_that_of_torch():
    weights = weights_of("lstm")
    lstm = torch.nn.LSTM(2, 3, num_layers=2).double()
    order = [slice(0, 3), slice(3, 6), slice(9, 12), slice(6, 9)]  # torch: enter, keep, new, leave
    with torch.no_grad():
        for k in range(2):
            rows = torch.cat([weights[f"w{k}"].T[place] for place in order])
            bias = torch.cat([weights[f"b{k}"][place] for place in order])
            split = rows.shape[1] - 3
            getattr(lstm, f"weight_ih_l{k}").copy_(rows[:, :split])
            getattr(lstm, f"weight_hh_l{k}").copy_(rows[:, split:])
            getattr(lstm, f"bias_ih_l{k}").copy_(bias)
            getattr(lstm, f"bias_hh_l{k}").zero_()
    gradients = torch.tensor([[0.5, -2.0, 1e-6], [3.0, 1e-3, 0.0]], dtype=F64)
    large = gradients.abs() >= math.exp(-10)
    logs = torch.where(large, gradients.abs().clamp(min=1e-9).log() / 10, -1.0)
    signs = torch.where(large, gradients.sign(), math.exp(10) * gradients)
    expected = 0.1 * lstm(torch.stack([logs, signs], dim=-1))[0] @ weights["out"]
    optimizer = learned_lstm(weights)
    state = optimizer.init(gradients[0])
    for g, e in zip(gradients, expected):
        updates, state = optimizer.update(g, state)
        torch.testing.assert_close(updates, e[:, 0].detach())


def test_coordinates_are_alike(kind):
    optimizer = MAKE[kind](weights_of(kind))
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(5, generator=generator, dtype=F64)
    p = torch.randn(5, generator=generator, dtype=F64)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = steps(optimizer, {"x": p}, {"x": g})["x"]
    mixed = steps(optimizer, {"x": p[order]}, {"x": g[order]})["x"]
    torch.testing.assert_close(mixed, found[order])


def test_derivatives_in_the_weights_are_exact_to_second_order(kind):
    weights = weights_of(kind)
    names = list(weights)

    def trained(*tensors):
        optimizer = MAKE[kind](dict(zip(names, tensors)))
        state, x = optimizer.init(PARAMS), PARAMS
        for _ in range(2):
            gradient = {"w": 2 * x["w"], "b": x["b"] ** 3 + 1}
            updates, state = optimizer.update(gradient, state, params=x, inplace=False)
            x = torchopt.apply_updates(x, updates, inplace=False)
        return x["w"].sum() + x["b"]

    leaves = [w.clone().requires_grad_() for w in weights.values()]
    assert gradcheck(trained, leaves, fast_mode=True)
    assert gradgradcheck(trained, leaves, fast_mode=True)


def test_inner_loop_gives_the_gradient_of_the_unrolled_steps(kind):
    weights = {name: w.requires_grad_() for name, w in weights_of(kind).items()}

    def loss(x, batch):
        return ((x["w"] - batch) ** 2).sum() + x["b"] ** 2

    batch = torch.tensor([[0.5, 0.1], [-0.3, 0.0]], dtype=F64)
    slopes = []
    for derivative in ("reverse", "mixed"):
        loop = torchopt.inner_loop(loss, MAKE[kind], steps=4, derivative=derivative)
        end = loop(PARAMS, batch, weights=weights)
        slopes.append(torch.autograd.grad(loss(end.params, batch), list(weights.values())))
    optimizer = MAKE[kind](weights)
    x, state = PARAMS, optimizer.init(PARAMS)
    for _ in range(4):
        g = torch.func.grad(loss)(x, batch)
        updates, state = optimizer.update(g, state, params=x, inplace=False)
        x = torchopt.apply_updates(x, updates, inplace=False)
    expected = torch.autograd.grad(loss(x, batch), list(weights.values()))
    assert all(e.abs().max() > 0 for e in expected)
    for found in slopes:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_batch_of_tasks_and_of_weights_is_each_of_them(kind):
    batch = {name: torch.stack([w, 1.3 * w]) for name, w in weights_of(kind).items()}
    starts = torch.tensor([[1.0, -2.0], [0.3, 4.0]], dtype=F64)

    def run(weights, x):
        return steps(MAKE[kind](weights), {"x": x}, {"x": x.cos()})["x"]

    found = torch.func.vmap(run)(batch, starts)
    for k in range(2):
        alone = run({name: w[k] for name, w in batch.items()}, starts[k])
        torch.testing.assert_close(found[k], alone)


def test_evolution_strategies_agree_with_the_explicit_gradient(kind):
    weights = weights_of(kind)
    optimizer = MAKE[kind]

    def start(weights):
        return PARAMS["w"], optimizer(weights).init(PARAMS["w"])

    def step(weights, carried, t):
        x, state = carried
        updates, state = optimizer(weights).update(2 * x, state, params=x, inplace=False)
        return (x + updates, state), ((x + updates) ** 2).sum()

    def total(weights):
        carried, losses = start(weights), []
        for t in range(3):
            carried, loss = step(weights, carried, t)
            losses.append(loss)
        return torch.stack(losses).sum()

    exact = torch.func.grad(total)(weights)
    loop = unrolled.InnerLoop(start, step, horizon=3)
    persistent = unrolled.persistent_es(loop, window=1, num_pairs=4000, sigma=1e-3)
    state, sums, variance = persistent.init(weights, seed=0), 0.0, 0.0
    for _ in range(3):
        found, state = persistent.estimate(weights, state)
        sums = sums + torch.cat([g.flatten() for g in found.gradient.values()])
        error = torch.cat([e.flatten() for e in found.standard_error.values()])
        variance = variance + error**2
    flat = torch.cat([exact[name].flatten() for name in found.gradient])
    assert ((sums - flat).abs() < 5 * variance.sqrt() + 1e-9).all()


def test_gradients_of_zero_leave_everything_finite(kind):
    weights = {name: w.requires_grad_() for name, w in weights_of(kind).items()}
    zeros = {name: torch.zeros_like(p) for name, p in PARAMS.items()}
    end = steps(MAKE[kind](weights), zeros, zeros)
    found = torch.autograd.grad(end["w"].sum() + end["b"], list(weights.values()))
    assert all(g.isfinite().all() for g in found)


def test_updates_keep_the_dtype_and_the_inputs(kind):
    optimizer = MAKE[kind](weights_of(kind))
    params = {"x": torch.ones(2)}
    state = optimizer.init(params)
    gradients = {"x": torch.full((2,), 0.5)}
    assert isinstance(state, {"mlp": LearnedMLPState, "lstm": LearnedLSTMState}[kind])
    before = [x.clone() for x in tree_leaves(state)]
    if kind == "lstm":
        weights = {name: w.float() for name, w in weights_of(kind).items()}
        optimizer = MAKE[kind](weights)
    updates, _ = optimizer.update(gradients, state, params=params)
    assert updates["x"].dtype == torch.float32
    assert (gradients["x"] == 0.5).all()
    for old, new in zip(before, tree_leaves(state)):
        assert torch.equal(old, new)


def test_bad_weights_and_calls_are_refused(kind):
    make, weights = MAKE[kind], weights_of(kind)
    with pytest.raises(ValueError, match=r"weights\['w0'\]: expected a tensor of shape"):
        make({**weights, "w0": weights["w0"][1:]})
    with pytest.raises(ValueError, match="got nothing"):
        make({name: w for name, w in weights.items() if name != "b0"})
    for wrong in (None, list(weights), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="weights: expected a dict of tensors, got"):
            make(wrong)
    with pytest.raises(ValueError, match=r"weights\['b0'\]: .*got torch.complex64"):
        make({**weights, "b0": weights["b0"].to(torch.complex64)})
    with pytest.raises(ValueError, match=r"weights\['w0'\]: .*got nothing"):
        make({name: w for name, w in weights.items() if name == "out"})
    optimizer = make(weights)
    state = optimizer.init(torch.ones(2).double())
    with pytest.raises(MismatchError, match="was made for another tensor than this gradient"):
        optimizer.update(torch.ones(3).double(), state, params=torch.ones(3).double())
    if kind == "mlp":
        with pytest.raises(AssertionError, match="Parameters are required"):
            optimizer.update(torch.ones(2).double(), state)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp_weights(4),
        lambda: mlp_weights((8, 0)),
        lambda: lstm_weights(0),
        lambda: lstm_weights(4, -1),
    ],
)
def test_sizes_that_are_no_counts_are_refused(make):
    with pytest.raises(ValueError, match="expected counts of at least 1, got"):
        make()


def test_a_leaf_without_a_gradient_is_left_alone(kind):
    optimizer = MAKE[kind](weights_of(kind))
    missing, given = {"w": PARAMS["w"], "b": None}, {"w": PARAMS["w"], "b": PARAMS["b"]}
    state = optimizer.init(PARAMS)
    updates, state = optimizer.update(missing, state, params=PARAMS)
    assert updates["b"] is None
    late, _ = optimizer.update(given, state, params=PARAMS)
    fresh, _ = optimizer.update(given, optimizer.init(PARAMS), params=PARAMS)
    torch.testing.assert_close(late["b"], fresh["b"], rtol=0, atol=0)
    assert not torch.equal(late["w"], fresh["w"])


def test_a_wrapped_optimizer_skips_parameters_without_gradients(kind):
    net = torch.nn.Linear(2, 3).double()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torchopt.Optimizer(net.parameters(), MAKE[kind](weights_of(kind)))
    optimizer.step()
    net.weight.grad = torch.ones_like(net.weight)
    optimizer.step()
    assert torch.equal(net.bias, before["bias"])
    assert not torch.equal(net.weight, before["weight"])


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_of_weights_and_parameters_may_differ(kind, dtype, weights_dtype):
    weights = {name: w.to(weights_dtype) for name, w in weights_of(kind).items()}
    gradient = torch.tensor([0.5, -0.25, 0.0], dtype=dtype)
    params = torch.tensor([1.0, -2.0, 0.5], dtype=dtype)
    optimizer = MAKE[kind](weights)
    exact = MAKE[kind]({name: w.double() for name, w in weights.items()})
    state, other = optimizer.init(params), exact.init(params.double())
    for _ in range(3):
        found, state = optimizer.update(gradient, state, params=params)
        expected, other = exact.update(gradient.double(), other, params=params.double())
    assert found.dtype == dtype
    # States and updates are rounded to their dtype, and 1 - 0.9999^t loses four digits in float32.
    eps = max(torch.finfo(x).eps for x in (dtype, weights_dtype))
    share = eps if eps > 1e-4 else 1e-5
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=share * float(expected.abs().max())
    )


def test_a_complex_number_is_two_coordinates(kind):
    optimizer = MAKE[kind](weights_of(kind))
    z = torch.tensor([1.0 - 2.0j, 0.5 + 0.1j], dtype=torch.complex128)
    pairs = torch.view_as_real(z)
    found, expected = (
        steps(optimizer, {"x": z}, {"x": z}),
        steps(optimizer, {"x": pairs}, {"x": pairs}),
    )
    torch.testing.assert_close(torch.view_as_real(found["x"]), expected["x"])
    assert (found["x"].imag != z.imag).all()
    torch.testing.assert_close(
        steps(optimizer, {"x": z.conj().resolve_conj()}, {"x": z}),
        steps(optimizer, {"x": z.conj()}, {"x": z}),
    )
