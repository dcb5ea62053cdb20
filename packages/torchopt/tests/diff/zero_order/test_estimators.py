# SPDX-License-Identifier: Apache-2.0
"""Estimators and directions: exact means and covariances."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

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
from torchopt.diff.zero_order.estimators import ESTIMATORS, Estimator, multi_point, shaped

F64 = torch.float64
A = torch.tensor([3.0, -1.0, 0.5], dtype=F64)
LIKE = [torch.zeros(3, dtype=F64)]
SIGMA = 0.3
SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=F64)


def losses_of(fn: Any, estimator: Estimator, z: Tensor, x: Tensor, sigma: float) -> Tensor:
    return torch.stack([fn(x + s * sigma * z) for s in estimator.offsets], dim=1)


@pytest.mark.parametrize("name", [*ESTIMATORS, "multi_point(3)"])
def test_exact_expectation_by_enumeration(name: str) -> None:
    # Over all pairs of sign vectors: every estimator is unbiased for a linear function.
    estimator = multi_point(3) if name.startswith("multi") else ESTIMATORS[name]
    x = torch.tensor([0.2, -0.4, 1.0], dtype=F64)

    def f(p: Tensor) -> Tensor:
        return p @ A + 10.0

    total = torch.zeros(3, dtype=F64)
    for i, j in itertools.product(range(8), repeat=2):
        z = SIGNS[[i, j]]
        total += estimator(losses_of(f, estimator, z, x, SIGMA), z, SIGMA, center=f(x))
    torch.testing.assert_close(total / 64, A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("directions", [Gaussian(), Rademacher(), Sphere()])
def test_covariance_of_a_pair_on_a_linear_function(directions: Directions) -> None:
    # E[z z' (a'z)^2] - a a': Gaussian |a|^2 I + a a'; signs |a|^2 I + a a' - 2 diag(a^2);
    # sphere D/(D+2) (|a|^2 I + 2 a a') - a a'
    n, D = 100_000, 3
    z = directions.draw(LIKE, 11, 0, n)[0]
    per_pair = (z @ A)[:, None] * z
    ata, aat = (A @ A) * torch.eye(D, dtype=F64), torch.outer(A, A)
    exact = {
        "Gaussian": ata + aat,
        "Rademacher": ata + aat - 2 * torch.diag(A.square()),
        "Sphere": D / (D + 2) * (ata + 2 * aat) - aat,
    }[type(directions).__name__]
    centered = per_pair - A
    products = centered[:, :, None] * centered[:, None, :]
    error = products.std(0) / n**0.5
    assert ((products.mean(0) - exact).abs() < 4 * error + 1e-9).all()


def test_covariance_of_naive_contains_the_offset() -> None:
    n = 50_000
    result = ZeroOrder(Gaussian(), "leave_one_out", num_samples=n, sigma=0.1).estimate(
        lambda x: x @ A + 1e3, LIKE[0], seed=0
    )
    # The leave-one-out baseline removes the offset, which is a thousand times A. A variance of
    # products of two normals has a relative error of at most (14 / n)^1/2, its root half of it.
    exact = ((A @ A + A.square()) / n).sqrt()
    torch.testing.assert_close(result.standard_error, exact, rtol=2 * (14 / n) ** 0.5, atol=0.0)
    assert ((result.gradient - A).abs() < 4 * exact).all()


def test_variance_of_baselines_is_ordered() -> None:
    def f(x: Tensor) -> Tensor:
        return x @ A + (x @ x) + 5.0

    error = {
        name: ZeroOrder(Gaussian(), name, num_samples=20_000, sigma=0.5)
        .estimate(f, LIKE[0], seed=1)
        .standard_error.norm()
        for name in ("naive", "leave_one_out", "optimal_baseline", "antithetic")
    }
    assert error["naive"] > 2 * error["leave_one_out"]
    assert error["leave_one_out"] > error["optimal_baseline"] > error["antithetic"]


def test_coefficients_multiply_the_direction_or_for_spsa_its_reciprocal() -> None:
    z = torch.tensor([0.5, -2.0], dtype=F64)
    assert estimators.identity(z) is z
    assert estimators.central.dual is estimators.identity
    assert estimators.spsa.dual(z).tolist() == [2.0, -0.5]


def test_bias_slopes() -> None:
    # Along one fixed direction the finite difference has an exact error: forward O(sigma),
    # central O(sigma^2), multi_point(2) O(sigma^4).
    z = torch.ones(1, 1, dtype=F64)
    x = torch.tensor([0.7], dtype=F64)

    def error(estimator: Estimator, sigma: float) -> float:
        losses = losses_of(lambda p: torch.sin(p).sum(-1), estimator, z, x, sigma)
        got = estimator(losses, z, sigma, center=torch.sin(x)[0])
        return abs(got.item() - math.cos(0.7))

    for estimator, order in (
        (estimators.forward, 1),
        (estimators.central, 2),
        (multi_point(2), 4),
        (multi_point(3), 6),
    ):
        # The next order adds 0.4 sigma to the first one; the sixth one is 4e-13 at 0.02, of which
        # rounding is 1 %.
        slope = math.log2(error(estimator, 0.04) / error(estimator, 0.02))
        assert slope == pytest.approx(order, abs=0.03)


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_multi_point_is_exact_for_polynomials(pairs: int) -> None:
    """Up to the degree 2 m, and not beyond."""
    z, x = torch.ones(1, 1, dtype=F64), torch.tensor([0.7], dtype=F64)

    def error(degree: int) -> float:
        losses = losses_of(lambda p: (p**degree).sum(-1), multi_point(pairs), z, x, SIGMA)
        return abs(multi_point(pairs)(losses, z, SIGMA).item() - degree * 0.7 ** (degree - 1))

    assert max(map(error, range(1, 2 * pairs + 1))) < 1e-12
    assert error(2 * pairs + 1) > 1e-4


def test_spsa_inverts_the_directions() -> None:
    z = torch.tensor([[2.0, -0.5]], dtype=F64)
    losses = torch.tensor([[1.0, 0.0]], dtype=F64)
    got = estimators.spsa(losses, z, 0.5)
    torch.testing.assert_close(got, torch.tensor([0.5, -2.0], dtype=F64))


@pytest.mark.parametrize("estimator", [estimators.naive, estimators.antithetic])
def test_rank_shaping_depends_only_on_the_order(estimator: Estimator) -> None:
    z = Gaussian().draw(LIKE, 0, 0, 20)[0]
    losses = losses_of(lambda p: p @ A, estimator, z, LIKE[0], SIGMA)
    for utility in (estimators.centered_ranks, estimators.nes_utilities):
        ranked = shaped(estimator, utility)
        got = ranked(losses, z, SIGMA)
        torch.testing.assert_close(got, ranked(torch.exp(losses) * 100, z, SIGMA))
        assert got @ A > 0  # an ascent direction of the loss
    scored = shaped(estimator, estimators.z_scores)
    torch.testing.assert_close(scored(losses, z, SIGMA), scored(3 * losses + 7, z, SIGMA))
    with pytest.raises(ValueError, match="does not use the loss at theta"):
        shaped(estimators.forward)


def test_utilities() -> None:
    losses = torch.tensor([[5.0, 1.0], [1.0, 9.0]], dtype=F64)
    ranks = estimators.centered_ranks(losses)
    expected = torch.tensor([[1 / 6, -1 / 3], [-1 / 3, 0.5]], dtype=F64)
    torch.testing.assert_close(ranks, expected)
    u = estimators.nes_utilities(torch.arange(10.0, dtype=F64))
    torch.testing.assert_close(u.sum(), torch.zeros((), dtype=F64))
    assert (u.diff() >= 0).all()
    assert (u[5:] == 0.1).all()
    assert (estimators.z_scores(torch.full((4,), 3.0)) == 0).all()


def test_pure_functions_report_wrong_shapes() -> None:
    z = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"expected losses of shape \[4, 2\]"):
        estimators.antithetic(torch.ones(4), z, 0.1)
    with pytest.raises(ValueError, match="expected center"):
        estimators.forward(torch.ones(4), z, 0.1)
    with pytest.raises(ValueError, match="num_samples of at least 2"):
        estimators.leave_one_out(torch.ones(1), z[:1], 0.1)


# --- directions -----------------------------------------------------------------------------------

SOURCES: list[Directions] = [Gaussian(), Rademacher(), Sphere(), Orthogonal(2), Sobol(16)]


@pytest.mark.parametrize("directions", SOURCES, ids=repr)
def test_moments(directions: Directions) -> None:
    n = 20_000
    z = directions.draw(LIKE, 4, 0, n)[0]
    assert (z.mean(0).abs() < 4 / n**0.5).all()
    # entries of z z' have variance at most 2 (Gaussian) and the coupled ones less
    assert ((z.T @ z / n - torch.eye(3, dtype=F64)).abs() < 4 * (2 / n) ** 0.5).all()


@pytest.mark.parametrize("directions", SOURCES, ids=repr)
def test_any_slice_is_the_same(directions: Directions) -> None:
    like = [torch.zeros(2, 2), torch.zeros((), dtype=F64), torch.zeros(3)]
    step = directions.coupled(8)
    whole = directions.draw(like, 4, 0, 3 * step)
    assert [x.shape for x in whole] == [(3 * step, 2, 2), (3 * step,), (3 * step, 3)]
    assert [x.dtype for x in whole] == [torch.float32, F64, torch.float32]
    part = directions.draw(like, 4, step, 2 * step)
    for x, y in zip(whole, part):
        assert torch.equal(x[step : 2 * step], y)
    other = directions.draw(like, 5, step, 2 * step)
    assert not all(torch.equal(x, y) for x, y in zip(part, other))


def test_orthogonal_block_measures_a_linear_function_without_redundance() -> None:
    z = Orthogonal().draw(LIKE, 0, 0, 3)[0]
    gram = z @ z.T
    torch.testing.assert_close(gram, torch.diag(torch.diagonal(gram)), rtol=0, atol=1e-12)
    # E |z|^2 = D: the lengths are those of Gaussian vectors
    lengths = Orthogonal().draw(LIKE, 0, 0, 30_000)[0].square().sum(1)
    assert abs(lengths.mean() - 3.0) < 4 * (6 / 30_000) ** 0.5
    # Gaussian: covariance per direction |a|^2 I + a a'; orthogonal frames leave only the lengths
    n = 3000
    plain = ZeroOrder(Gaussian(), "antithetic", num_samples=n).estimate(lambda x: x @ A, LIKE[0])
    frame = ZeroOrder(Orthogonal(), "antithetic", num_samples=n).estimate(lambda x: x @ A, LIKE[0])
    assert frame.standard_error.norm() < 0.9 * plain.standard_error.norm()
    assert ((frame.gradient - A).abs() < 4.5 * frame.standard_error).all()


def test_sobol_error_is_below_the_independent_one_and_its_bar_is_honest() -> None:
    def f(x: Tensor) -> Tensor:
        return x @ A + torch.sin(x).sum()

    truth = A + math.exp(-0.5)  # E cos(z) for sigma 1
    plain = ZeroOrder(Gaussian(), "antithetic", num_samples=4096).estimate(f, LIKE[0], seed=0)
    sobol = ZeroOrder(Sobol(128), "antithetic", num_samples=4096).estimate(f, LIKE[0], seed=0)
    assert sobol.standard_error.norm() < 0.4 * plain.standard_error.norm()
    # 32 blocks: Student's t
    assert ((sobol.gradient - truth).abs() < 4.5 * sobol.standard_error).all()


@pytest.mark.parametrize("directions", [Orthogonal(2), Sobol(16)], ids=repr)
@pytest.mark.parametrize("chunk_size", [1, 5, 40])
def test_coupled_directions_give_one_result_for_all_chunk_sizes(
    directions: Directions, chunk_size: int
) -> None:
    def run(chunk: int | None) -> Any:
        engine = ZeroOrder(directions, "leave_one_out", num_samples=45, chunk_size=chunk)
        return engine.estimate(lambda x: torch.sin(x @ A), LIKE[0], seed=2)

    one, many = run(None), run(chunk_size)
    torch.testing.assert_close(many.gradient, one.gradient)
    torch.testing.assert_close(many.standard_error, one.standard_error)
    assert many.effective_sample_size == pytest.approx(one.effective_sample_size)


def test_guided_directions_have_the_stated_covariance_and_mean() -> None:
    n, alpha = 50_000, 0.3
    guided = Guided(A[:, None], alpha)
    z = guided.draw(LIKE, 0, 0, n)[0]
    u = A / A.norm()
    C = alpha * torch.eye(3, dtype=F64) + (1 - alpha) * 3 * torch.outer(u, u)
    assert torch.trace(C).item() == pytest.approx(3.0)
    products = z[:, :, None] * z[:, None, :]
    assert ((products.mean(0) - C).abs() < 4 * products.std(0) / n**0.5).all()
    b = torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    got = ZeroOrder(guided, "antithetic", num_samples=n).estimate(lambda x: x @ b, LIKE[0], seed=1)
    assert ((got.gradient - C @ b).abs() < 4 * got.standard_error).all()
    with pytest.raises(ValueError, match=r"shape \[2, k\]"):
        guided.draw([torch.zeros(2)], 0, 0, 1)
    with pytest.raises(ValueError, match="alpha in"):
        Guided(A[:, None], 0.0)
    with pytest.raises(ValueError, match="at least one column"):
        Guided(torch.ones(3, 0))


def test_effective_sample_size() -> None:
    one = ZeroOrder(Rademacher(), "naive", num_samples=64).estimate(
        lambda x: 0 * x.sum() + 2.0, LIKE[0], seed=0
    )
    assert one.effective_sample_size == pytest.approx(64)  # all coefficients equal
    few = ZeroOrder(Gaussian(), "naive", num_samples=64).estimate(
        lambda x: torch.exp(3 * x.sum()), LIKE[0], seed=0
    )
    assert 1.0 <= few.effective_sample_size < 16  # a heavy tail dominates the estimate


def test_peak_memory_does_not_grow_with_the_number_of_samples() -> None:
    largest = 0

    class Watch(Gaussian):
        def draw(self, *args: Any) -> list[Tensor]:
            nonlocal largest
            out = super().draw(*args)
            largest = max(largest, sum(x.numel() for x in out))
            return out

    x = torch.zeros(1000)
    for n in (8, 64):
        ZeroOrder(Watch(), "antithetic", num_samples=n, chunk_size=8).estimate(
            lambda p: p.sum(), x, seed=0
        )
    assert largest == 8 * 1000


@pytest.mark.parametrize("size", [0, -2, 2.0, True])
def test_blocks_without_directions_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="Orthogonal: size: expected an integer of at least 1"):
        Orthogonal(size)
    with pytest.raises(ValueError, match="Sobol: size: expected a power of two"):
        Sobol(size)


def test_points_of_a_block_are_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="expected a power of two, got 48"):
        Sobol(48)
    # As many points on each side of the median as on the other.
    z = Sobol(32).draw(LIKE, 0, 0, 32)[0]
    assert ((z > 0).sum(0) == 16).all()


def test_a_distribution_whose_parameter_would_get_no_gradient_is_refused() -> None:
    scale = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match="got scale that requires one"):
        ZeroOrder(torch.distributions.Normal(0.0, scale))
    ZeroOrder(torch.distributions.Normal(0.0, scale.detach()))
