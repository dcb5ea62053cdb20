# SPDX-License-Identifier: Apache-2.0
"""Means, covariances, biases and orders of variance of all estimators, against closed forms.

Tolerances are four standard errors of the measured value; the fixed seeds stay within them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchopt.diff.zero_order import (
    Directions,
    Gaussian,
    Guided,
    Orthogonal,
    Rademacher,
    Sobol,
    Sphere,
    ZeroOrder,
    estimators,
)
from torchopt.diff.zero_order.estimators import (
    ESTIMATORS,
    Estimator,
    as_estimator,
    multi_point,
    shaped,
)
from torchopt.diff.zero_order.evaluate import ENTRIES_PER_CHUNK, Sampling
from torchopt.diff.zero_order.evaluator import Evaluator
from torchopt.diff.zero_order.low_rank import LowRank
from torchopt.diff.zero_order.unrolled import (
    InnerLoop,
    UnrolledEstimator,
    full_es,
    noise_reuse_es,
    persistent_es,
    truncated_es,
)

F64 = torch.float64
A = torch.tensor([3.0, -1.0, 0.5], dtype=F64)
H = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]], dtype=F64)
EYE, AAT, SQUARE = torch.eye(3, dtype=F64), torch.outer(A, A), float(A @ A)
LIKE = [torch.zeros(3, dtype=F64)]
OFFSET, SIGMA = 10.0, 0.3

ALL = [*ESTIMATORS.values(), multi_point(2), multi_point(3)]


def linear(x: Tensor) -> Tensor:
    return x @ A + OFFSET


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * ((x @ H) * x).sum(-1) + x @ A + OFFSET


# --- means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: e.name)
@pytest.mark.parametrize("fn", [linear, quadratic])
def test_unbiased_with_a_hundred_thousand_samples(estimator: Estimator, fn: Any) -> None:
    x = torch.tensor([1.0, -2.0, 0.7], dtype=F64)
    directions = Rademacher() if estimator.name == "spsa" else Gaussian()
    engine = ZeroOrder(directions, estimator, num_samples=100_000, sigma=SIGMA)
    result = engine.estimate(fn, x, seed=1)
    exact = A if fn is linear else A + H @ x
    assert ((result.gradient - exact).abs() < 4 * result.standard_error).all()
    # the error bar is small enough to notice a wrong sign, factor or baseline
    largest = 0.3 if estimator.name == "naive" else 0.1
    assert (result.standard_error < largest).all()


@pytest.mark.parametrize("directions", [Sphere(), Orthogonal(2), Orthogonal(), Sobol(16)], ids=repr)
@pytest.mark.parametrize("method", ["antithetic", "leave_one_out", "optimal_baseline"])
def test_unbiased_on_a_quadratic_for_other_directions(directions: Directions, method: str) -> None:
    x = torch.tensor([1.0, -2.0, 0.7], dtype=F64)
    engine = ZeroOrder(directions, method, num_samples=20_000, sigma=SIGMA)
    result = engine.estimate(quadratic, x, seed=3)
    assert ((result.gradient - A - H @ x).abs() < 4 * result.standard_error).all()


def test_a_baseline_of_coupled_samples_leaves_out_their_block() -> None:
    # Two Sobol points a block are far from independent. A baseline that contained the other point
    # of the own block would be biased by E[f(z_j) z_i] / (N - 1), here by more than ten bars.
    x = torch.zeros(1, dtype=F64)
    engine = ZeroOrder(Sobol(2), "leave_one_out", num_samples=4, sigma=1.0)
    draws = torch.stack(
        [engine.estimate(lambda p: p.sum(), x, seed=s, with_error=False)[0] for s in range(1500)]
    )
    error = draws.std(0) / 1500**0.5
    assert ((draws.mean(0) - 1.0).abs() < 4 * error).all()
    with pytest.raises(ValueError, match="num_samples of at least 3, got 2"):
        ZeroOrder(Sobol(2), "leave_one_out", num_samples=2).estimate(lambda p: p.sum(), x)


# --- covariances on a linear function -------------------------------------------------------------

GAUSSIAN = SQUARE * EYE + AAT  # of one direction: E[(a'z)^2 z z'] - a a'
REST = A - torch.tensor([2.0, 0.0, 1.0], dtype=F64)
HALF_NORMAL = (2 / math.pi) ** 0.5

# estimator, directions, N of one estimate, mean, covariance of one estimate
COVARIANCES: dict[str, tuple[Estimator, Directions, int, Tensor, Tensor]] = {
    "naive": (
        estimators.naive, Gaussian(), 1, A, GAUSSIAN + (OFFSET / SIGMA) ** 2 * EYE,
    ),
    "forward": (estimators.forward, Gaussian(), 1, A, GAUSSIAN),
    "antithetic": (estimators.antithetic, Gaussian(), 1, A, GAUSSIAN),
    "antithetic of four": (estimators.antithetic, Gaussian(), 4, A, GAUSSIAN / 4),
    "central": (estimators.central, Gaussian(), 1, A, GAUSSIAN),
    "multi_point": (multi_point(3), Gaussian(), 1, A, GAUSSIAN),
    "spsa": (
        estimators.spsa, Rademacher(), 1, A, SQUARE * EYE + AAT - 2 * torch.diag(A.square()),
    ),
    # The estimate is S a, with S the unbiased sample covariance of the N directions: Wishart.
    "leave_one_out": (estimators.leave_one_out, Gaussian(), 4, A, GAUSSIAN / 3),
    # With two samples the weighted mean of "the others" is the other one.
    "optimal_baseline": (estimators.optimal_baseline, Gaussian(), 2, A, GAUSSIAN),
    # u = sign(a'z) / 2: a pair gives sign(a'z) z / (2 sigma)
    "shaped": (
        shaped(estimators.antithetic), Gaussian(), 1,
        HALF_NORMAL * A / SQUARE**0.5 / (2 * SIGMA),
        (EYE - HALF_NORMAL**2 * AAT / SQUARE) / (2 * SIGMA) ** 2,
    ),
    "sphere": (
        estimators.antithetic, Sphere(), 1, A, 3 / 5 * (SQUARE * EYE + 2 * AAT) - AAT,
    ),
    # A full frame measures a exactly but for the lengths: r^2 / D has variance 2 / D.
    "orthogonal": (
        estimators.antithetic, Orthogonal(), 3, A, 2 / (3 * 5) * (SQUARE * EYE + 2 * AAT),
    ),
}  # fmt: skip


def assert_moments(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    n = len(draws)
    centered = draws - mean
    assert (centered.mean(0).abs() < 4 * draws.std(0) / n**0.5).all()
    products = centered[:, :, None] * centered[:, None, :]
    error = products.std(0) / n**0.5
    assert ((products.mean(0) - covariance).abs() < 4 * error + 1e-9).all()
    assert (error < 0.05 * covariance.diagonal().max()).all()


@pytest.mark.parametrize("name", COVARIANCES)
def test_exact_covariance_on_a_linear_function(name: str) -> None:
    estimator, directions, n, mean, covariance = COVARIANCES[name]
    repetitions = 50_000
    z = directions.draw(LIKE, 8, 0, repetitions * n)[0].reshape(repetitions, n, 3)
    losses = torch.stack([linear(s * SIGMA * z) for s in estimator.offsets], dim=2)
    center = linear(torch.zeros(3, dtype=F64))
    draws = torch.func.vmap(lambda f, z: estimator(f, z, SIGMA, center=center))(losses, z)
    assert_moments(draws, mean, covariance)


def test_exact_covariance_with_a_control_variate() -> None:
    # of f - h'x: norm(a - h)^2 I + (a - h)(a - h)', around the mean a
    z = Gaussian().draw(LIKE, 9, 0, 50_000)[0]
    pair = estimators.antithetic
    losses = torch.stack([linear(s * SIGMA * z) for s in pair.offsets], dim=1)
    h = A - REST
    changed = estimators.control_variate(pair, losses, [z], SIGMA, [h])
    draws = torch.func.vmap(lambda f, z: pair(f[None], z[None], SIGMA))(changed, z) + h
    assert_moments(draws, A, REST @ REST * EYE + torch.outer(REST, REST))


def test_exact_covariance_of_guided_directions() -> None:
    b = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    guided, alpha = Guided(A[:, None], 0.3), 0.3
    C = alpha * EYE + (1 - alpha) * 3 * AAT / SQUARE
    z = guided.draw(LIKE, 10, 0, 100_000)[0]
    assert_moments((z @ b)[:, None] * z, C @ b, (b @ C @ b) * C + torch.outer(C @ b, C @ b))


@pytest.mark.parametrize("rank", [1, 3])
def test_exact_covariance_of_low_rank_perturbations(rank: int) -> None:
    # the formula of `LowRank`: that of Gaussian directions and a part of order 1 / r
    G = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.0]], dtype=F64)
    n = 200_000
    E = LowRank(rank).noise({"w": G}, 3, 0, n).materialize({"w": G})["w"]
    draws = ((E * G).sum((1, 2))[:, None, None] * E).flatten(1)
    I2, I3, I6, g = torch.eye(2).double(), EYE, torch.eye(6).double(), G.flatten()
    extra = torch.einsum("ik,jl->ijkl", G @ G.T, I3) + torch.einsum("ik,jl->ijkl", I2, G.T @ G)
    extra = extra + torch.einsum("il,kj->ijkl", G, G)
    exact = (g @ g) * I6 + torch.outer(g, g) + 2 / rank * extra.reshape(6, 6)
    assert_moments(draws, g, exact)


def test_error_bars_are_those_of_the_closed_forms() -> None:
    # the user's `standard_error` against the covariances above
    for name in ("forward", "antithetic", "leave_one_out", "optimal_baseline"):
        n = 50_000
        bar = ZeroOrder(Gaussian(), name, num_samples=n, sigma=SIGMA).estimate(
            linear, LIKE[0], seed=2
        )[1]
        exact = (GAUSSIAN.diagonal() / n).sqrt()
        # A variance of products of two normals has a relative error of at most (14 / n)^1/2, that
        # of z^2, and its root of half as much; four of them.
        torch.testing.assert_close(bar, exact, rtol=2 * (14 / n) ** 0.5, atol=0.0)


# --- bias -----------------------------------------------------------------------------------------


class Skewed(Directions):
    """Independent entries 2 with probability 1/5 and -1/2 otherwise: mean 0, variance 1, third
    moment 3/2. The first directions run through all values of one entry, so that means are exact.
    """

    def draw(self, like: Any, seed: int, start: int, stop: int) -> list[Tensor]:
        values = torch.tensor([2.0, -0.5, -0.5, -0.5, -0.5], dtype=F64)
        rows = values[torch.arange(start, stop) % 5]
        return [rows.reshape(-1, *(1,) * x.ndim).expand(-1, *x.shape).clone() for x in like]


def test_bias_of_forward_differences_is_of_first_order() -> None:
    # E[(f(x + s z) - f(x)) z] / s = f' + s/2 E[z^3] f'' + O(s^2): with a third moment, slope one
    # and the constant 3/4 f''; differences on both sides cancel it.
    x = torch.tensor(0.7, dtype=F64)

    def bias(method: str, sigma: float) -> float:
        engine = ZeroOrder(Skewed(), method, num_samples=5, sigma=sigma)
        return engine.estimate(torch.sin, x, seed=0).gradient.item() - math.cos(0.7)

    sigmas = [0.1 / 2**k for k in range(4)]
    for method, order in (("forward", 1), ("antithetic", 2)):
        biases = [abs(bias(method, s)) for s in sigmas]
        slopes = [math.log2(b / c) for b, c in zip(biases, biases[1:])]
        assert slopes[-1] == pytest.approx(order, abs=0.03)  # the next order is 1 % at 0.0125
    assert bias("forward", 1e-5) / 1e-5 == pytest.approx(-0.75 * math.sin(0.7), rel=1e-3)


# --- variances in their order ---------------------------------------------------------------------


def error_of(directions: Directions, method: Any, fn: Any, n: int = 8192) -> float:
    engine = ZeroOrder(directions, method, num_samples=n, sigma=0.5)
    return float(engine.estimate(fn, torch.ones(3, dtype=F64), seed=5).standard_error.norm())


def test_variances_are_ordered_as_proved() -> None:
    def smooth(x: Tensor) -> Tensor:
        return quadratic(x) + torch.sin(2 * x).sum()

    naive, forward, loo, best, pair = (
        error_of(Gaussian(), m, smooth)
        for m in ("naive", "forward", "leave_one_out", "optimal_baseline", "antithetic")
    )
    # a baseline removes the offset, the optimal one is optimal, a pair removes all even terms
    assert naive > 2 * forward
    assert naive > 2 * loo > 2 * pair
    assert best < 1.001 * loo

    def bowl(x: Tensor) -> Tensor:
        return quadratic(x) + 4 * (x - 1) @ (x - 1)  # large where the direction is long

    loo, best = (error_of(Gaussian(), m, bowl) for m in ("leave_one_out", "optimal_baseline"))
    assert loo > 1.05 * best
    assert forward > pair
    # frames and points that fill the space: below independent directions; signs: least of all
    # independent entries
    assert pair > 1.3 * error_of(Orthogonal(), "antithetic", smooth)
    assert pair > 1.3 * error_of(Sobol(128), "antithetic", smooth)
    assert pair > error_of(Rademacher(), "antithetic", smooth)
    # higher stencils trade variance for bias
    assert error_of(Gaussian(), multi_point(3), smooth) > 0.9 * pair


def test_variance_of_low_rank_falls_to_that_of_dense_noise() -> None:
    net = nn.Linear(4, 3, bias=False).double()
    x = torch.randn(5, 4, dtype=F64)
    error = [
        float(
            LowRank(r, num_samples=20_000, sigma=0.1)
            .estimate(net, lambda m: m(x).sum(), seed=0)
            .standard_error["weight"]
            .norm()
        )
        for r in (1, 2, 4, 16)
    ]
    G = x.sum(0).expand(3, 4)
    dense = float((13 * G.square().sum() / 20_000).sqrt())  # trace of |G|^2 I + g g'
    assert error[0] > error[1] > error[2] > error[3] > 0.97 * dense
    # the excess is of order 1 / r: Frobenius of all three extra terms, 2/r (4 + 3 + 1) |G|^2
    # The seed is fixed: over 12 seeds the deviation of the ratio was 5 % for r = 1, 1 % for r = 16.
    for r, e in zip((1, 2, 4, 16), error):
        rel = 0.02 if r == 16 else 0.05
        assert e**2 / dense**2 == pytest.approx(1 + 2 / r * 8 / 13, rel=rel)


# --- inner loops ----------------------------------------------------------------------------------

# s_t = sin(4 s_{t-1} + theta) is chaotic: a derivative grows by exp(0.8) or so each step, to 5e6
# after twenty. u_t = u_{t-1} + theta makes the loss c theta - u_t + s_t fall with theta in the long
# run, and rise within a window.
T, K, C = 20, 10, 8.0
SMOOTHING = 0.1
THETA = torch.tensor(1.0, dtype=F64)


def chaotic_start(theta: Tensor) -> tuple[Tensor, Tensor]:
    return 0.3 + 0 * theta, 0 * theta


def chaotic_step(theta: Tensor, state: Any, t: int) -> tuple[Any, Tensor]:
    s, u = state
    s, u = torch.sin(4 * s + theta), u + theta
    return (s, u), C * theta - u + s


CHAOS = InnerLoop(chaotic_start, chaotic_step, T)


def chaotic_loss(z: Tensor, y: Tensor) -> Tensor:
    """Return the loss of an episode whose halves are perturbed by sigma z and sigma y."""
    state, total = chaotic_start(THETA + 0 * z), torch.zeros_like(z)
    for t in range(T):
        state, loss = chaotic_step(THETA + SMOOTHING * (z if t < K else y), state, t)
        total = total + loss
    return total


def grid(n: int) -> tuple[Tensor, Tensor]:
    """Return the midpoints of [-6, 6] and the weights of the normal distribution there."""
    z = (torch.arange(n, dtype=F64) + 0.5) * (12 / n) - 6
    w = torch.exp(-0.5 * z.square())
    return z, w / w.sum()


def chaotic_truth(make: Callable[..., Any]) -> float:
    """Return the derivative of the smoothed loss by quadrature: noise of the episode for NRES and
    full ES, of each window for PES.
    """
    if make is persistent_es:
        z, w = grid(800)
        losses = chaotic_loss(z[:, None].expand(800, 800), z[None].expand(800, 800))
        return float((w[:, None] * w * losses * (z[:, None] + z)).sum() / SMOOTHING)
    z, w = grid(400_000)
    return float((w * chaotic_loss(z, z) * z).sum() / SMOOTHING)


def run_episode(es: UnrolledEstimator, windows: int) -> tuple[float, float]:
    state, value, error = es.init(THETA, 0), 0.0, 0.0
    for _ in range(windows):
        result, state = es.estimate(THETA, state)
        value += result.gradient.item()
        error += result.standard_error.item()  # correlated windows: at most the sum
    assert state.inner is None
    return value, error


def test_the_toy_is_chaotic() -> None:
    theta = THETA.clone().requires_grad_()
    state, total = chaotic_start(theta), torch.zeros((), dtype=F64)
    for t in range(T):
        state, loss = chaotic_step(theta, state, t)
        total = total + loss
    assert torch.autograd.grad(total, theta)[0].abs() > 1e5  # the gradient is useless


@pytest.mark.parametrize("make", [persistent_es, noise_reuse_es, full_es])
def test_unbiased_on_a_chaotic_loop_where_truncation_has_the_wrong_sign(make: Any) -> None:
    options: dict[str, Any] = {"num_pairs": 20_000, "sigma": SMOOTHING}
    truth = chaotic_truth(make)
    assert truth < -40
    window = {} if make is full_es else {"window": K}
    value, error = run_episode(make(CHAOS, **window, **options), 1 if make is full_es else T // K)
    assert abs(value - truth) < 4 * error < 10
    wrong, wrong_error = run_episode(truncated_es(CHAOS, window=K, **options), T // K)
    assert wrong - 4 * wrong_error > 20


def test_variance_of_noise_reuse_is_below_that_of_persistent_es() -> None:
    # Windows with a loss a theta each, of one parameter: window w of PES is
    # a z_w (z_1 + ... + z_w), of variance (w + 1) a^2; NRES has 2 a^2 in all of them.
    windows, n, a = 6, 20_000, 3.0
    loop = InnerLoop(torch.zeros_like, lambda p, s, t: (s, a * p), horizon=windows)
    each = {}
    for make in (persistent_es, noise_reuse_es):
        es = make(loop, window=1, num_pairs=n, sigma=0.5)
        state, bars = es.init(THETA, 2), []
        for _ in range(windows):
            result, state = es.estimate(THETA, state)
            bars.append(result.standard_error.item() ** 2 * n / a**2)
        each[make] = bars
    # As in test_unrolled: the relative error of a variance of products of normals, 40^1/2 / n^1/2,
    # is 4.5 %, and much less where products with independent factors are summed.
    assert each[persistent_es][0] == pytest.approx(2.0, rel=0.12)
    assert each[persistent_es][-1] == pytest.approx(windows + 1, rel=0.12)
    assert each[noise_reuse_es] == pytest.approx([2.0] * windows, rel=0.12)
    assert each[persistent_es][-1] > 3 * each[noise_reuse_es][-1]


@pytest.mark.parametrize("dimension", [7, 1282, 4810, 2**15, 2**15 + 1, 2**17, 2**17 + 1])
@pytest.mark.parametrize("directions", [Gaussian(), Rademacher()], ids=lambda d: type(d).__name__)
def test_a_direction_does_not_depend_on_the_range_that_is_drawn(
    directions: Gaussian | Rademacher, dimension: int
) -> None:
    like = [torch.zeros(dimension - 5), torch.zeros(5)]
    together = directions.drawn_together(dimension)
    n = min(2 * together + 3, 60)
    whole = directions.draw(like, 3, 0, n)
    assert not torch.equal(whole[0][0], whole[0][n - 1])
    for start, stop in ((0, 1), (1, n), (n // 2, n // 2 + 2), (together % n, n)):
        part = directions.draw(like, 3, start, stop)
        assert all(torch.equal(x, y[start:stop]) for x, y in zip(part, whole, strict=True))
    one = list(directions.leaves(like, 3, n - 1))
    assert all(torch.equal(x, y[n - 1]) for x, y in zip(one, whole, strict=True))


@pytest.mark.parametrize("count", [1, 100, 1000, 5000])
def test_chunks_are_about_equal_and_end_between_blocks(count: int) -> None:
    leaves = [torch.zeros(2410)]
    together = Gaussian().drawn_together(2410)
    assert together > 1
    two = as_estimator("antithetic")
    sampling = Sampling(Gaussian(), two, count, 0.1, 0, Evaluator())
    chunks = sampling.chunks(leaves)
    assert [x for x, _ in chunks] == [0, *(y for _, y in chunks[:-1])]
    assert chunks[-1][1] == count
    assert all(x % together == 0 for x, _ in chunks)
    rows = [y - x for x, y in chunks]
    assert max(rows) * 2 * 2410 <= ENTRIES_PER_CHUNK + together * 2 * 2410
    assert min(rows) > 0.5 * max(rows)
