# SPDX-License-Identifier: Apache-2.0
"""Search distributions: means, variances and Fisher matrices in closed form."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import torchopt
from torchopt.diff import ZeroOrder
from torchopt.diff.zero_order import Gaussian, Guided, unrolled
from torchopt.diff.zero_order.estimators import centered_ranks, nes_utilities
from torchopt.diff.zero_order.search import PGPE, SNES, GuidedES, SearchDistribution
from torchopt.errors import NotDifferentiableError

F64 = torch.float64
MEAN = torch.tensor([0.4, -1.0, 2.0], dtype=F64)
SCALE = torch.tensor([0.5, 1.5, 0.2], dtype=F64)
SEARCH = SearchDistribution(MEAN, SCALE.log())
H = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, -0.3], [0.1, -0.3, 4.0]], dtype=F64)
B = torch.tensor([1.0, -0.5, 0.3], dtype=F64)


def quadratic(x):
    return 0.5 * x @ H @ x + B @ x + 7.0


def expected_loss(mean, log_scale):
    """E f(mean + s z)."""
    return quadratic(mean) + 0.5 * (H.diagonal() * (2 * log_scale).exp()).sum()


EXACT = torch.func.grad(expected_loss, (0, 1))(*SEARCH)
# The metric of the Kullback-Leibler divergence at the distribution itself.
FISHER = torch.func.hessian(
    lambda p: kl_divergence(
        Independent(Normal(MEAN, SCALE), 1), Independent(Normal(p[:3], p[3:].exp()), 1)
    )
)(torch.cat([MEAN, SCALE.log()]))
NATURAL = torch.linalg.solve(FISHER, torch.cat(EXACT)).split(3)


def many(estimator, fn, search=SEARCH, n=250):
    """Return estimates with different seeds: `[n, D]` for the mean, `[n, ...]` for the scale."""
    found = [estimator.estimate(fn, search, seed=k, with_error=False).gradient for k in range(n)]
    return torch.stack([f.mean for f in found]), torch.stack([f.log_scale for f in found])


@pytest.mark.parametrize(
    ("estimator", "exact"), [(PGPE(400_000), EXACT), (SNES(800_000), NATURAL)], ids=["PGPE", "SNES"]
)
def test_gradients_are_unbiased_within_their_error_bars(estimator, exact):
    found = estimator.estimate(quadratic, SEARCH, seed=3)
    for part, error, true in zip(found.gradient, found.standard_error, exact):
        assert ((part - true).abs() < 4 * error).all()
        assert (error < 0.03 * exact[0].norm()).all()


@pytest.mark.parametrize("n", [2, 5])
def test_few_samples_are_unbiased_too(n):
    # The leave-one-out baseline has no bias at any number of samples.
    for estimator, exact in ((PGPE(n), EXACT), (SNES(n), NATURAL)):
        for part, true in zip(many(estimator, quadratic), exact):
            error = part.std(0) / len(part) ** 0.5
            assert ((part.mean(0) - true).abs() < 4 * error).all()


def test_variance_of_a_pair_on_a_linear_function():
    n = 40_000
    found = PGPE(n).estimate(lambda x: B @ x + 100.0, SEARCH, seed=1)
    exact = (((SCALE * B) ** 2).sum() / SCALE**2 + B**2) / n
    # A variance of products of two normals has a relative error of at most (14 / n)^1/2.
    error = 4 * (14 / n) ** 0.5
    torch.testing.assert_close(found.standard_error.mean**2, exact, rtol=error, atol=0.0)
    assert ((found.gradient.mean - B).abs() < 4 * exact.sqrt()).all()
    assert found.gradient.log_scale.abs().max() < 1e-10  # pairs of a linear function agree


def test_variance_of_the_scale_on_a_quadratic_function():
    # With l = h s^2 and w = z^2 - 1 the estimate is the sample covariance of q = sum l w / 2 and w,
    # of variance m / N - c^2 (N - 2) / (N (N - 1)) + 2 E q^2 / (N (N - 1)),
    # m = E q^2 w_i^2 = 15 l_i^2 + the sum of the other l_j^2, and c = l_i.
    h, n = torch.tensor([1.0, 0.3, 20.0], dtype=F64), 6
    level = h * SCALE**2
    squares = (level**2).sum()
    m = 14 * level**2 + squares
    exact = m / n - level**2 * (n - 2) / (n * (n - 1)) + squares / (n * (n - 1))
    estimator = PGPE(n)

    def estimate(z):
        values = torch.stack([0.5 * (h * (s * SCALE * z) ** 2).sum(1) for s in (1, -1)], dim=1)
        _, levels = estimator.weights(values + 3.0)
        (part,) = estimator.scale_parts(z, lambda v: v, z)
        return (levels[:, None] * part).mean(0)

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400_000, n, 3, generator=generator, dtype=F64)
    found = torch.func.vmap(estimate)(z)
    squares = (found - level) ** 2
    error = squares.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - level).abs() < 4 * (exact / len(found)).sqrt()).all()
    assert ((squares.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.02 * exact).all()


def test_the_fisher_matrix_is_that_of_the_divergence():
    expected = torch.diag(torch.cat([SCALE**-2, torch.full((3,), 2.0, dtype=F64)]))
    torch.testing.assert_close(FISHER, expected)


def test_a_shared_scale_has_the_sum_of_derivatives():
    tree = {"a": MEAN[:2], "b": MEAN[2]}
    each = SearchDistribution(tree, {"a": torch.zeros(2).double(), "b": torch.zeros(()).double()})
    shared = SearchDistribution(tree, torch.zeros((), dtype=F64))

    def fn(x):
        return quadratic(torch.cat([x["a"], x["b"][None]]))

    apart, together = (PGPE(10).estimate(fn, s, seed=5).gradient for s in (each, shared))
    torch.testing.assert_close(together.mean, apart.mean)
    total = apart.log_scale["a"].sum() + apart.log_scale["b"]
    torch.testing.assert_close(together.log_scale, total)
    plain, natural = (kind(10).estimate(fn, shared, seed=5).gradient for kind in (PGPE, SNES))
    assert plain.log_scale.shape == natural.log_scale.shape == ()
    one_sided = [SNES(10).estimate(fn, s, seed=5).gradient.log_scale for s in (each, shared)]
    mean = (one_sided[0]["a"].sum() + one_sided[0]["b"]) / 3  # F = 2 n, of a sum
    torch.testing.assert_close(one_sided[1], mean)


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_guided_search_has_the_mean_of_its_covariance(alpha):
    subspace = torch.tensor([[1.0], [-0.7], [0.2]], dtype=F64)
    search = SearchDistribution(MEAN, torch.tensor(-0.5, dtype=F64))
    u = subspace / subspace.norm()
    C = alpha * torch.eye(3, dtype=F64) + (1 - alpha) * 3 * u @ u.T
    found = GuidedES(200_000, subspace=subspace, alpha=alpha).estimate(quadratic, search, seed=2)
    exact = (C @ (H @ MEAN + B), torch.exp(2 * search.log_scale) * (H @ C).trace())
    for part, error, true in zip(found.gradient, found.standard_error, exact):
        assert ((part - true).abs() < 4 * error).all()
        assert (error < 0.05 * true.norm()).all()
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = torch.linalg.solve(C, z.T).T
    torch.testing.assert_close(Guided(subspace, alpha).precision(z), expected)


def test_a_good_guide_has_less_variance():
    search = SearchDistribution(torch.zeros(40, dtype=F64), torch.tensor(0.0, dtype=F64))
    slope = torch.linspace(-1, 1, 40, dtype=F64)
    errors = []
    for alpha in (0.1, 1.0):
        guided = GuidedES(2000, subspace=slope[:, None], alpha=alpha)
        found = guided.estimate(lambda x: slope @ x, search, seed=0)
        errors.append((found.standard_error.mean.norm() / found.gradient.mean.norm()).item())
    assert errors[0] < 0.5 * errors[1]


def test_the_step_of_snes_is_that_of_the_paper():
    found = SNES(8, nes_utilities).estimate(quadratic, SEARCH, seed=4).gradient
    from torchopt.diff.zero_order import Gaussian

    z = Gaussian().draw([MEAN], 4, 0, 8)[0]
    losses = torch.stack([quadratic(MEAN + SCALE * y) for y in z])
    order = losses.argsort()
    rank = torch.arange(1, 9, dtype=F64)
    weights = (torch.log(torch.tensor(5.0)) - rank.log()).clamp(min=0)
    weights = weights / weights.sum() - 1 / 8
    best = z[order]
    torch.testing.assert_close(-found.mean, SCALE * (weights @ best))
    torch.testing.assert_close(-found.log_scale, weights @ (best**2 - 1) / 2)


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def test_snes_learns_the_units_of_the_unknowns():
    units = torch.tensor([1.0, 1e-2, 1e3], dtype=F64)
    search = SearchDistribution.around(torch.ones(3, dtype=F64), 1.0)
    steps = {"mean": torchopt.sgd(1.0), "scale": torchopt.sgd(0.45)}
    optimizer = torchopt.transform.partition(steps, SearchDistribution("mean", "scale"))
    state = optimizer.init(search)
    for k in range(150):
        found = SNES(12, nes_utilities).estimate(
            lambda x: ((x - 3.0) / units).square().sum(), search, seed=k, with_error=False
        )
        updates, state = optimizer.update(found.gradient, state, params=search)
        search = torchopt.apply_updates(search, updates)
    assert (((search.mean - 3.0) / units).abs() < 1e-4).all()
    assert search.log_scale.argsort().tolist() == units.argsort().tolist()


def test_adam_updates_mean_and_scale_together():
    search = SearchDistribution.around(torch.zeros(3, dtype=F64), 0.1)
    adam = torchopt.adam(0.02)
    state = adam.init(search)
    for k in range(300):
        found = PGPE(10, centered_ranks).estimate(rosenbrock, search, seed=k, with_error=False)
        updates, state = adam.update(found.gradient, state)
        search = torchopt.apply_updates(search, updates)
    assert rosenbrock(search.mean) < 0.5


def test_a_loss_without_a_derivative_and_with_arguments():
    def count(x, target):
        return ((x - target).abs() > 1).sum()  # an integer

    found = PGPE(500).estimate(count, SEARCH, MEAN + 2, seed=0)
    assert (found.gradient.mean < 0).all()
    assert found.evaluations == 1000


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PGPE(1), ValueError, "num_samples: expected at least 2"),
        (lambda: SNES(2.5), TypeError, "num_samples: expected an integer"),
        (lambda: SearchDistribution.around(MEAN, 0.0), ValueError, "scale: expected a number > 0"),
        (
            lambda: PGPE(2).estimate(quadratic, SearchDistribution(MEAN, torch.zeros(2))),
            ValueError,
            r"PGPE: log_scale: expected tensors that broadcast .* got \[\(2,\)\]",
        ),
        (
            lambda: PGPE(2).estimate(quadratic, SearchDistribution(MEAN, -1.0)),
            TypeError,
            "PGPE: log_scale: expected floating-point tensors",
        ),
        (
            lambda: PGPE(2).estimate(quadratic, SearchDistribution(MEAN * 1j, MEAN)),
            TypeError,
            "PGPE: mean: expected real numbers",
        ),
        (
            lambda: GuidedES(2, subspace=H).estimate(quadratic, SEARCH),
            ValueError,
            "GuidedES: log_scale: expected one 0-dim tensor",
        ),
        (
            lambda: PGPE(2).estimate(quadratic, SearchDistribution(MEAN, {"w": MEAN})),
            ValueError,
            "PGPE: log_scale: expected tensors for leaves of the mean, got a tree below one",
        ),
        (
            lambda: PGPE(2).estimate(quadratic, MEAN),
            TypeError,
            "PGPE: distribution: expected a SearchDistribution, got Tensor",
        ),
        (
            lambda: GuidedES(2, subspace=[[1.0], [2.0]]),
            ValueError,
            r"Guided: expected a subspace of shape \[D, k\], a tensor, got list",
        ),
        (lambda: GuidedES(2, subspace=H, alpha=0.0), ValueError, "alpha"),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: SNES(4).estimate(quadratic, SearchDistribution(x, x)).gradient.mean,
        lambda x: ZeroOrder(Gaussian(), num_samples=4).estimate(quadratic, x).gradient,
        lambda x: estimated_over_windows(x),
    ],
    ids=["search", "engine", "windows"],
)
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_an_estimate_has_no_silent_derivative_of_zero(make, transform):
    with pytest.raises(NotDifferentiableError, match="would silently be zero"):
        transform(make)(MEAN)
    with pytest.raises(RuntimeError, match="inside of a vmap"):
        torch.func.vmap(make)(MEAN[None])


def estimated_over_windows(x):
    loop = unrolled.InnerLoop(lambda p: p, lambda p, s, t: (s, (p * s).sum()), horizon=2)
    es = unrolled.persistent_es(loop, window=1, num_pairs=3, sigma=0.1)
    return es.estimate(x, es.init(x, seed=0))[0].gradient


@pytest.mark.parametrize("make", [PGPE, SNES])
def test_none_in_the_mean_is_no_unknown(make):
    mean = {"a": torch.zeros(2, dtype=torch.float64), "none": None}
    for search in (
        SearchDistribution.around(mean, 0.5),
        SearchDistribution(mean, torch.zeros((), dtype=torch.float64)),
    ):
        found = make(4).estimate(lambda x: x["a"].sum(), search, seed=0).gradient
        plain = SearchDistribution({"a": mean["a"]}, search.log_scale)
        if isinstance(search.log_scale, dict):
            plain = SearchDistribution.around({"a": mean["a"]}, 0.5)
        other = make(4).estimate(lambda x: x["a"].sum(), plain, seed=0).gradient
        assert found.mean["none"] is None
        torch.testing.assert_close(found.mean["a"], other.mean["a"])


def test_a_mean_without_elements_has_a_gradient_of_zeros():
    for estimator in (PGPE(3), SNES(3)):
        search = SearchDistribution(torch.zeros(0), torch.tensor(-1.0))
        found = estimator.estimate(lambda x: x.sum(), search).gradient
        assert found.mean.shape == (0,)
        assert found.log_scale == 0


@pytest.mark.parametrize("make", [PGPE, SNES])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_leaves_and_losses_of_other_dtypes_have_the_gradients_of_float64(make, dtype):
    mean = {"a": torch.tensor([0.5, -1.0]).to(dtype), "b": torch.tensor([2.0], dtype=torch.float32)}
    shared = torch.tensor(-1.0).to(dtype)

    def loss(x):
        return (x["a"].double() ** 2).sum() + 3 * x["b"].double().sum()

    for wide in (loss, lambda x: loss(x).to(dtype)):
        found = make(64).estimate(wide, SearchDistribution(mean, shared), seed=0)
        doubles = SearchDistribution({k: x.double() for k, x in mean.items()}, shared.double())
        expected = many_leaves(make(20_000).estimate(loss, doubles, seed=1).gradient)
        assert found.gradient.mean["a"].dtype == found.gradient.log_scale.dtype == dtype
        errors = many_leaves(found.standard_error)
        for part, true, error in zip(many_leaves(found.gradient), expected, errors):
            assert ((part - true).abs() < 5 * error + 0.05 * true.abs()).all()


def many_leaves(distribution):
    return [x.double() for x in (*distribution.mean.values(), distribution.log_scale)]


@pytest.mark.parametrize("n", [4, 300])
def test_utilities_that_are_the_losses_change_nothing(n):
    for make in (PGPE, SNES):
        plain = make(n).estimate(quadratic, SEARCH, seed=0)
        shaped = make(n, lambda losses: 1.0 * losses).estimate(quadratic, SEARCH, seed=0)
        torch.testing.assert_close(shaped, plain)


def test_steps_by_ranks_do_not_grow_with_the_number_of_samples():
    sizes = [
        SNES(n, centered_ranks).estimate(quadratic, SEARCH, seed=0).gradient.mean.norm()
        for n in (1000, 10_000)
    ]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


@pytest.mark.parametrize(
    ("dtype", "mean", "scale"),
    [(torch.float32, 1000.0, 1e-6), (torch.bfloat16, 100.0, 0.01), (F64, 1.0, 1e-17)],
)
def test_a_scale_below_the_resolution_of_the_mean_is_noticed(dtype, mean, scale):
    means = {"a": torch.zeros(3, dtype=dtype), "w": torch.full((2,), mean, dtype=dtype)}
    search = SearchDistribution.around(means, 1.0)
    fine = {k: x.clone() for k, x in search.log_scale.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGPE(2).estimate(lambda p: p["w"].sum(), search)
    fine["w"][1] = math.log(scale)
    match = r"expected exp\(log_scale\) above the resolution.* at mean\['w'\] 1 of 2 entries"
    with pytest.warns(UserWarning, match=match):
        PGPE(2).estimate(lambda p: p["w"].sum(), SearchDistribution(means, fine))
