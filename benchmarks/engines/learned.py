# SPDX-License-Identifier: Apache-2.0
"""Learned optimizers: the cost of a step, and the gradient of a training run in their weights.

A perceptron for each coordinate trains a linear classifier for twenty steps; the gradient is that
of the sum of the losses. The reference is reverse mode through all steps, which is first compared
with central differences in a random direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import torchopt
from benchmarks.engines.figures import distance, timed
from torchopt.diff import Explicit
from torchopt.diff.zero_order import unrolled
from torchopt.optimizers.learned import learned_lstm, learned_mlp, lstm_weights, mlp_weights

Params = dict[str, Tensor]
STEPS, WINDOW, PAIRS, SIGMA = 20, 5, 1000, 0.01
ENGINES = {
    "explicit: all steps": Explicit(),
    "explicit: 5 snapshots": Explicit(keep=5),
    "explicit: mixed mode": Explicit(derivative="mixed"),
    "explicit: first order": Explicit(derivative="first_order"),
    f"explicit: last {WINDOW} steps": Explicit(window=WINDOW),
}
ESTIMATORS = {
    "truncated ES": unrolled.truncated_es,
    "persistent ES": unrolled.persistent_es,
}


def make(weights: Params) -> torchopt.GradientTransformation:
    """Return the optimizer."""
    return learned_mlp(weights, step_scale=0.03, exponent_scale=0.1)


def data() -> tuple[Params, tuple[Tensor, Tensor], Params]:
    """Return a classifier, its batch, and the weights of an optimizer."""
    generator = torch.Generator().manual_seed(0)
    net = {
        "w": torch.randn(10, 4, dtype=torch.float64, generator=generator) / 3,
        "b": torch.zeros(4, dtype=torch.float64),
    }
    x = torch.randn(64, 10, dtype=torch.float64, generator=generator)
    y = (x @ torch.randn(10, 4, dtype=torch.float64, generator=generator)).argmax(1)
    return net, (x, y), mlp_weights((16,), generator=generator, dtype=torch.float64)


def loss_of(net: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of a linear classifier."""
    x, y = batch
    return torch.nn.functional.cross_entropy(x @ net["w"] + net["b"], y)


def explicit(engine: Explicit, weights: Params) -> Tensor:
    """Return the gradient by the explicit engine, flat."""
    net, batch, _ = data()
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    loop = engine.over(loss_of, make, steps=STEPS)
    total = loop(net, batch, weights=weights).losses.sum()
    found = torch.autograd.grad(total, list(weights.values()), materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def sampled(estimator: Any, weights: Params) -> Tensor:
    """Return the sum of the estimates of all windows, flat."""
    net, batch, _ = data()

    def start(weights: Params) -> Any:
        return net, make(weights).init(net)

    def step(weights: Params, carried: Any, t: int) -> tuple[Any, Tensor]:
        net, state = carried
        gradient, loss = torch.func.grad_and_value(loss_of)(net, batch)
        updates, state = make(weights).update(gradient, state, params=net, inplace=False)
        return (torchopt.apply_updates(net, updates, inplace=False), state), loss

    loop = unrolled.InnerLoop(start, step, STEPS)
    es = estimator(loop, window=WINDOW, num_pairs=PAIRS, sigma=SIGMA)
    state, total = es.init(weights, 0), torch.zeros((), dtype=torch.float64)
    for _ in range(STEPS // WINDOW):
        found, state = es.estimate(weights, state)
        total = total + torch.cat([found.gradient[name].flatten() for name in weights])
    return total


def checked_reference(weights: Params) -> Tensor:
    """Return the gradient in reverse mode; raise if it disagrees with differences."""
    net, batch, _ = data()
    found = explicit(Explicit(), weights)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(len(found), dtype=torch.float64, generator=generator)
    parts = direction.split([w.numel() for w in weights.values()])

    def value(t: float) -> float:
        moved = {k: w + t * d.reshape(w.shape) for (k, w), d in zip(weights.items(), parts)}
        loop = torchopt.inner_loop(loss_of, make(moved), steps=STEPS)
        return float(loop(net, batch).losses.sum())

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    torch.testing.assert_close(float(found @ direction), slope, rtol=1e-6, atol=1e-7)
    return found


def by_hand(
    weights: Params, *, first_order: bool = False, last: int = STEPS, window: int = STEPS
) -> Tensor:
    """Return the gradient in reverse mode through a plain loop, flat.

    Args:
        weights: The weights of the optimizer.
        first_order: Take the gradients of the steps as constants.
        last: Differentiate the last steps alone.
        window: Cut the loop after every so many steps.
    """
    net, batch, _ = data()
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    optimizer = make(weights)
    state, total = optimizer.init(net), torch.zeros((), dtype=torch.float64)
    for t in range(STEPS):
        if t % window == 0 or t == STEPS - last:
            net, state = torchopt.tree.tree_map(torch.detach, (net, state))
        leaves = {name: w if w.requires_grad else w.requires_grad_() for name, w in net.items()}
        with torch.enable_grad():
            loss = loss_of(leaves, batch)
            slopes = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        gradient = dict(zip(leaves, slopes))
        if first_order:
            gradient = {name: g.detach() for name, g in gradient.items()}
        updates, state = optimizer.update(gradient, state, params=leaves, inplace=False)
        net = torchopt.apply_updates(leaves, updates, inplace=False)
        total = total + loss
        if t < STEPS - last:
            total = total.detach()
    found = torch.autograd.grad(total, list(weights.values()), materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def check_estimate(name: str, found: Tensor, mean: Tensor) -> None:
    """Raise unless an estimate along its mean is as long as the mean.

    The relative variance of the product of an estimate of PAIRS directions with its mean is
    2 / PAIRS. A persistent estimate is a sum over windows of estimates whose directions add up, at
    most one for each window; that multiplies the variance by no more than their number. Four
    standard deviations are allowed.
    """
    ratio = float(found @ mean / (mean @ mean))
    if abs(ratio - 1) > 4 * (2 * (STEPS // WINDOW) / PAIRS) ** 0.5:
        raise AssertionError(f"{name}: the estimate along its mean is {ratio:.3f} of it")


def measure(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each engine."""
    weights = data()[2]
    exact, rows = checked_reference(weights), []
    for name, engine in ENGINES.items():
        found, times = timed(lambda: explicit(engine, weights), repeats)  # noqa: B023 - at once
        truncated = {"last": WINDOW} if "last" in name else {}
        wanted = by_hand(weights, first_order="first order" in name, **truncated)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
        rows.append({"engine": name, **times, **distance(found, exact)})
    means = {"truncated ES": by_hand(weights, window=WINDOW), "persistent ES": exact}
    for name, estimator in ESTIMATORS.items():
        found, times = timed(lambda: sampled(estimator, weights), repeats)  # noqa: B023
        check_estimate(name, found, means[name])
        label = f"{name}, {PAIRS} pairs, windows of {WINDOW}"
        rows.append({"engine": label, **times, **distance(found, exact)})
    return [*rows, *steps(repeats)]


def check_step(name: str, optimizer: Any, found: Params, params: Params) -> None:
    """Raise unless a step agrees with the same step in double precision, to 1e-4 of its size."""
    double = {k: p.double() for k, p in params.items()}
    expected = optimizer.update(double, optimizer.init(double), params=double, inplace=False)[0]
    for k, wanted in expected.items():
        share = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(found[k].double(), wanted, rtol=0, atol=share, msg=name)


def steps(repeats: int) -> list[dict[str, Any]]:
    """Return the time of a step, and how many numbers of state each parameter has."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"w1": (64, 32), "b1": (32,), "w2": (32, 10), "b2": (10,)}
    params = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    count = sum(p.numel() for p in params.values())
    optimizers = {
        "a step of adam": torchopt.adam(1e-3),
        "a step of learned_mlp, 32-32": learned_mlp(mlp_weights(generator=generator)),
        "a step of learned_lstm, 2 x 20": learned_lstm(lstm_weights(generator=generator)),
    }
    rows = []
    for name, optimizer in optimizers.items():
        state = optimizer.init(params)

        def step() -> Any:
            return optimizer.update(params, state, params=params, inplace=False)  # noqa: B023

        with torch.no_grad():
            check_step(name, optimizer, step()[0], params)
            _, times = timed(step, 20 * repeats)
        leaves = [x for x in torchopt.tree.tree_leaves(state) if isinstance(x, Tensor)]
        numbers = sum(x.numel() for x in leaves if x.is_floating_point())
        rows.append({"step": name, **times, "parameters": count, "state": numbers / count})
    return rows
