# SPDX-License-Identifier: Apache-2.0
"""Evolution strategies for inner loops against derivatives of the unrolled loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchopt.diff.zero_order import Rademacher
from torchopt.diff.zero_order.unrolled import (
    InnerLoop,
    UnrolledEstimator,
    full_es,
    noise_reuse_es,
    persistent_es,
    truncated_es,
)

F64 = torch.float64
T, K = 12, 3
THETA = {"a": torch.tensor([0.3, -0.2], dtype=F64), "b": torch.tensor(0.5, dtype=F64)}


def start(params: Any) -> Any:
    return {"s": torch.ones(2, dtype=F64) + 0 * params["a"], "m": params["b"] * 1.0}


def step(params: Any, state: Any, t: int) -> tuple[Any, Tensor]:
    # linear in theta with a quadratic loss, so smoothing does not change the gradient
    m = 0.8 * state["m"] + 0.1 * state["s"].sum() + params["b"]
    s = 0.9 * state["s"] - 0.2 * m + params["a"]
    return {"s": s, "m": m}, 0.5 * s.square().sum() + (t % 2) * m


LOOP = InnerLoop(start, step, T)
PAIRS = {"window": K, "num_pairs": 30_000, "sigma": 0.1}


def unrolled_gradient(cut: int | None) -> dict[str, Tensor]:
    """Return the gradient of the sum of losses, cutting the graph every `cut` steps."""
    theta = {k: v.clone().requires_grad_() for k, v in THETA.items()}
    state, total = start(theta), torch.zeros((), dtype=F64)
    for t in range(T):
        if cut and t and t % cut == 0:
            state = {k: v.detach() for k, v in state.items()}
        state, loss = step(theta, state, t)
        total = total + loss
    return dict(zip(theta, torch.autograd.grad(total, list(theta.values()))))


def episode(es: UnrolledEstimator, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the sum of estimates and a bound on its standard error."""
    state = es.init(THETA, seed)
    total = {k: torch.zeros_like(v) for k, v in THETA.items()}
    error = {k: torch.zeros_like(v) for k, v in THETA.items()}
    while True:
        result, state = es.estimate(THETA, state)
        for k in THETA:
            total[k] += result.gradient[k]
            error[k] += result.standard_error[k]  # correlated windows: at most the sum
        if state.inner is None:
            return total, error


@pytest.mark.parametrize("make", [persistent_es, noise_reuse_es])
def test_unbiased_over_an_episode(make: Any) -> None:
    truth, wrong = unrolled_gradient(None), unrolled_gradient(K)
    got, error = episode(make(LOOP, **PAIRS))
    for k in THETA:
        assert ((got[k] - truth[k]).abs() < 4 * error[k]).all()
        # the truncated gradient is far away, so the test would notice it
        assert ((wrong[k] - truth[k]).abs() > 8 * error[k]).all()


def test_full_es_is_unbiased_in_one_window() -> None:
    truth = unrolled_gradient(None)
    got, error = episode(full_es(LOOP, num_pairs=30_000, sigma=0.1))
    for k in THETA:
        assert ((got[k] - truth[k]).abs() < 4 * error[k]).all()


def test_truncated_es_estimates_the_truncated_gradient() -> None:
    # its first window starts at start(theta), unperturbed
    theta = {k: v.clone().requires_grad_() for k, v in THETA.items()}
    state, total = start(THETA), torch.zeros((), dtype=F64)
    for t in range(T):
        if t % K == 0:
            state = {k: v.detach() for k, v in state.items()}
        state, loss = step(theta, state, t)
        total = total + loss
    truth = dict(zip(theta, torch.autograd.grad(total, list(theta.values()))))
    got, error = episode(truncated_es(LOOP, **PAIRS))
    for k in THETA:
        assert ((got[k] - truth[k]).abs() < 4 * error[k]).all()


def test_truncation_can_have_the_wrong_sign() -> None:
    # s_t = t theta, L_t = 2 theta - s_t: the whole gradient is 2 T - T (T + 1) / 2, a window of one
    # step sees 2 - 1. Signs as directions and linear losses: exact for truncated and reused noise.
    loop = InnerLoop(
        lambda p: torch.zeros_like(p), lambda p, s, t: (s + p, 2 * p - (s + p)), horizon=10
    )
    theta = torch.tensor(0.7, dtype=F64)

    def total(es: UnrolledEstimator) -> tuple[float, float]:
        state, value, error = es.init(theta, 0), 0.0, 0.0
        for _ in range(10):
            result, state = es.estimate(theta, state)
            value += result.gradient.item()
            error += result.standard_error.item()
        assert state.inner is None
        return value, error

    options: dict[str, Any] = {"window": 1, "num_pairs": 4, "sigma": 0.1}
    assert total(truncated_es(loop, directions=Rademacher(), **options))[0] == pytest.approx(10.0)
    assert total(noise_reuse_es(loop, directions=Rademacher(), **options))[0] == pytest.approx(-35)
    value, error = total(persistent_es(loop, window=1, num_pairs=50_000, sigma=0.1))
    assert abs(value + 35) < 4 * error < 20


def test_variance_of_pes_grows_with_the_window_and_that_of_nres_does_not() -> None:
    loop = InnerLoop(lambda p: torch.zeros_like(p), lambda p, s, t: (s, 3.0 * p), horizon=4)
    theta = torch.tensor(0.0, dtype=F64)
    n = 40_000
    for make, variance in (
        (persistent_es, lambda w: (w + 1) * 9.0),
        (noise_reuse_es, lambda w: 2 * 9.0),
    ):
        es = make(loop, window=1, num_pairs=n, sigma=0.5)
        state = es.init(theta, 1)
        for w in range(1, 5):
            result, state = es.estimate(theta, state)
            # the relative error of a variance of products of normals is below 4 * sqrt(40 / n)
            got = result.standard_error.item() ** 2 * n
            assert got == pytest.approx(variance(w), rel=0.12)
            assert result.evaluations == 2 * n


def test_episodes_start_again_with_new_directions() -> None:
    es = noise_reuse_es(LOOP, window=T // 2, num_pairs=2, sigma=0.1)
    state = es.init(THETA, 0)
    seen = []
    for _ in range(4):
        result, state = es.estimate(THETA, state)
        seen.append(result.gradient["b"].item())
    assert state.inner is None
    assert len(set(seen)) == 4
    again, _ = es.estimate(THETA, es.init(THETA, 0))
    assert again.gradient["b"].item() == seen[0]


def test_wrong_options_are_reported() -> None:
    with pytest.raises(ValueError, match="a divisor of the horizon 12, got 5"):
        persistent_es(LOOP, window=5, num_pairs=1, sigma=0.1)
    with pytest.raises(ValueError, match="`num_pairs`"):
        full_es(LOOP, num_pairs=0, sigma=0.1)
    with pytest.raises(ValueError, match="`sigma`"):
        full_es(LOOP, num_pairs=1, sigma=0.0)


def test_the_start_and_the_first_step_draw_different_numbers() -> None:
    seen = []

    def start(theta: torch.Tensor) -> torch.Tensor:
        seen.append(float(torch.rand(())))
        return theta

    def step(theta: torch.Tensor, state: torch.Tensor, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(float(torch.rand(())))
        return state, theta * state

    es = full_es(InnerLoop(start, step, 2), num_pairs=4, sigma=0.1)
    theta = torch.ones((), dtype=torch.float64)
    es.estimate(theta, es.init(theta, 0))
    assert len(set(seen)) == len(seen) == 3
