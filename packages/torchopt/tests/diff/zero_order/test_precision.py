# SPDX-License-Identifier: Apache-2.0
"""Half precision, integers, complex numbers, scales: every estimator, direction and path."""

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
    seed_replay,
)
from torchopt.diff.zero_order.directions import as_directions
from torchopt.diff.zero_order.error_bars import Spread, effective_sample_size
from torchopt.diff.zero_order.estimators import ESTIMATORS, Estimator, multi_point, shaped
from torchopt.diff.zero_order.low_rank import LowRank
from torchopt.diff.zero_order.unrolled import InnerLoop, full_es, noise_reuse_es, truncated_es
from torchopt.errors import NotDifferentiableError

F64 = torch.float64
HALF = (torch.bfloat16, torch.float16)
ALL: list[Estimator] = [
    *ESTIMATORS.values(),
    multi_point(2),
    shaped(estimators.antithetic),
    shaped(estimators.naive, estimators.nes_utilities),
    shaped(estimators.antithetic, estimators.z_scores),
]
SOURCES: list[Directions] = [
    Gaussian(),
    Rademacher(),
    Sphere(),
    Orthogonal(2),
    Sobol(16),
    Guided(torch.tensor([[1.0], [0.5]], dtype=F64), 0.5),
]


def name_of(x: Any) -> str:
    return x.name if isinstance(x, Estimator) else type(x).__name__


# --- sums over samples ----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALL, ids=name_of)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sums_in_half_precision_do_not_depend_on_the_chunk_size(
    estimator: Estimator, dtype: torch.dtype
) -> None:
    # Every direction has its own float64 oracle: the same noise and losses, summed at once.
    n, x = 192, torch.tensor([0.5, -0.25], dtype=dtype)

    def f(p: Tensor) -> Tensor:
        return 30 * p[..., 0].float() + p[..., 1].float()

    options: dict[str, Any] = {"num_samples": n, "sigma": 0.125}
    z = Rademacher().draw([x], 3, 0, n)[0]
    losses = torch.stack([f(x + s * 0.125 * z) for s in estimator.offsets], 1).double()
    oracle = estimator.estimate(losses, z.double(), 0.125, f(x).double())
    for chunk_size in (2, None):
        engine = ZeroOrder(Rademacher(), estimator, chunk_size=chunk_size, **options)
        got = engine.estimate(f, x, seed=3)
        assert got.gradient.dtype == got.standard_error.dtype == dtype
        tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 2e-3}
        torch.testing.assert_close(got.gradient.double(), oracle.gradient, **tolerance)
        torch.testing.assert_close(got.standard_error.double(), oracle.standard_error, **tolerance)
        assert got.effective_sample_size == pytest.approx(oracle.effective_sample_size, rel=1e-5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_thousands_of_samples_in_small_chunks_give_the_exact_slope(dtype: torch.dtype) -> None:
    engine = ZeroOrder(Rademacher(), "antithetic", num_samples=2400, sigma=0.125, chunk_size=8)
    got = engine.estimate(lambda x: (30 * x).sum(), torch.ones(1, dtype=dtype), seed=0)
    assert (got.gradient.item(), got.standard_error.item()) == (30.0, 0.0)
    assert got.effective_sample_size == 2400


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("directions", SOURCES, ids=name_of)
def test_half_precision_agrees_with_float64_for_all_directions(
    dtype: torch.dtype, directions: Directions
) -> None:
    a = torch.tensor([3.0, -1.0], dtype=dtype)
    engine = ZeroOrder(directions, "antithetic", num_samples=256, sigma=1.0, chunk_size=16)
    half = engine.estimate(lambda x: x.float() @ a.float(), torch.zeros(2, dtype=dtype), seed=1)
    n = directions.draw([torch.zeros(2, dtype=dtype)], 1, 0, 256)[0].double()
    exact = (n @ a.double())[:, None] * n
    # Sums are in float32, and the mean is rounded once to the dtype of the leaf.
    sums = 256 * torch.finfo(torch.float32).eps * exact.abs().mean().item()
    rounded = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(half.gradient.double(), exact.mean(0), rtol=rounded, atol=sums)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_seed_replay_sums_in_float32(dtype: torch.dtype) -> None:
    w = torch.ones(2, dtype=dtype)
    g = seed_replay.estimate(
        lambda: 2 * w[0] + w[1], [w], num_samples=300, sigma=0.125, seed=0, directions=Rademacher()
    )
    z = torch.stack([Rademacher().draw([w], 0, i, i + 1)[0][0] for i in range(300)]).double()
    exact = (g.coefficients.double()[:, None] * z).mean(0)
    (mean,) = g.materialize([w])
    torch.testing.assert_close(mean.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    g.add_to_([w], -0.5)
    torch.testing.assert_close(
        w.double(), 1 - exact / 2, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_low_rank_sums_in_float32(dtype: torch.dtype) -> None:
    net = nn.Linear(1, 1, bias=True).to(dtype)
    nn.init.ones_(net.weight)
    nn.init.zeros_(net.bias)

    def run(chunk_size: int | None) -> Any:
        engine = LowRank(num_samples=600, sigma=0.125, chunk_size=chunk_size)
        return engine.estimate(net, lambda m: 30 * m.weight.sum() + m.bias.sum(), seed=0)

    one, many = run(None), run(7)
    for name in ("weight", "bias"):
        assert one.gradient[name].isfinite().all()
        torch.testing.assert_close(many.gradient[name], one.gradient[name])
        torch.testing.assert_close(many.standard_error[name], one.standard_error[name])
    # products of two normals: variance 30^2 (E[a^4] E[b^4] - 1) = 8 * 900
    assert abs(one.gradient["weight"].item() - 30) < 4 * (8 * 900 / 600) ** 0.5


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_unrolled_sums_in_float32(dtype: torch.dtype) -> None:
    loop = InnerLoop(torch.zeros_like, lambda p, s, t: (s, 30 * p), 2)
    es = noise_reuse_es(loop, window=1, num_pairs=4096, sigma=0.125, directions=Rademacher())
    theta = torch.ones((), dtype=dtype)
    got, _ = es.estimate(theta, es.init(theta, seed=0))
    assert (got.gradient.item(), got.standard_error.item()) == (30.0, 0.0)
    assert got.gradient.dtype == dtype


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 1e10, 1e25])
def test_error_bars_scale_with_the_loss_in_float32(scale: float) -> None:
    def run(s: float, dtype: torch.dtype) -> Any:
        x = torch.zeros(3, dtype=dtype)
        a = torch.tensor([3.0, -1.0, 0.5], dtype=dtype)
        return ZeroOrder(Rademacher(), "antithetic", num_samples=50).estimate(
            lambda p: (p @ a) * s, x, seed=0
        )

    got, exact = run(scale, torch.float32), run(1.0, F64)
    error = got.standard_error.double() / scale
    torch.testing.assert_close(error, exact.standard_error, rtol=1e-4, atol=1e-4)
    assert got.effective_sample_size == pytest.approx(exact.effective_sample_size, rel=1e-4)
    c = torch.tensor([1.0, 2.0, 3.0])
    assert effective_sample_size(c * scale) == pytest.approx(36 / 14)


# --- integers and bools ---------------------------------------------------------------------------

COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "uint8": lambda x: (x > 0).sum().to(torch.uint8),
    "int16": lambda x: (x > 0).sum().to(torch.int16),
    "int64": lambda x: (x > 0).sum(),
    "bool": lambda x: (x[0] > 0) & (x[1] > -10),
}


@pytest.mark.parametrize("name", [*ESTIMATORS, "multi_point(2)"])
def test_autocast_does_not_round_losses_and_sums(name: str) -> None:
    """In bfloat16 the losses would be equal, and so would be their differences to zero."""
    estimator = multi_point(2) if name == "multi_point(2)" else ESTIMATORS[name]
    x = torch.tensor([1.0, -3.0, 0.5], requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return 100.0 + (x**2).sum()

    def derivatives(enabled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        engine = ZeroOrder(Gaussian(), estimator, num_samples=64, sigma=0.1, chunk_size=16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = list(engine.estimate(loss, x.detach(), seed=0)[:2])
            second = estimator.curvature is not None
            found += torch.autograd.grad(engine(loss)(x), x, create_graph=second)
            if second:
                found += torch.autograd.grad(found[-1].sum(), x)
        return [y.detach() for y in found]

    for got, want in zip(derivatives(True), derivatives(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", ALL, ids=name_of)
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_losses(estimator: Estimator, name: str) -> None:
    count, x = COUNTS[name], torch.zeros(2)
    engine = ZeroOrder(Rademacher(), estimator, num_samples=8, generator=torch.Generator())
    exact = engine.estimate(lambda p: count(p).double(), x, seed=3)
    torch.testing.assert_close(engine.estimate(count, x, seed=3), exact)
    z = Rademacher().draw([x], 3, 0, 8)[0]
    losses = torch.stack(
        [torch.stack([count(s * row) for row in z]) for s in estimator.offsets], dim=1
    )
    torch.testing.assert_close(estimator(losses, z, 1.0, count(x)), exact.gradient)
    assert exact.gradient.any()
    seed = int(torch.randint(2**62, (), generator=engine.generator.manual_seed(5)))
    engine.generator.manual_seed(5)
    leaf = x.clone().requires_grad_()
    value = engine(count)(leaf)
    assert value.item() == float(count(x))
    (got,) = torch.autograd.grad(2 * value, leaf)
    torch.testing.assert_close(got, 2 * engine.estimate(count, x, seed=seed).gradient)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_losses_of_models_and_loops(name: str) -> None:
    count = COUNTS[name]
    w = torch.zeros(2)
    replayed, exact = (
        seed_replay.estimate(f, [w], num_samples=8, sigma=1.0, seed=0).coefficients
        for f in (lambda: count(w), lambda: count(w).double())
    )
    torch.testing.assert_close(replayed, exact)
    net = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(net.weight)
    for f in (lambda m: count(m.weight[:, 0]), lambda m: count(m.weight[:, 0]).double()):
        got = LowRank(num_samples=8, sigma=1.0).estimate(net, f, seed=0).gradient["weight"]
        w, exact = got, got if f is not None else exact
    loop = InnerLoop(torch.zeros_like, lambda p, s, t: (s, count(p)), 1)
    wide = InnerLoop(torch.zeros_like, lambda p, s, t: (s, count(p).double()), 1)
    results = []
    for each in (loop, wide):
        es = full_es(each, num_pairs=8, sigma=1.0)
        results.append(es.estimate(torch.zeros(2), es.init(None, seed=0))[0])
    torch.testing.assert_close(*results)
    assert results[0].gradient.any()


def test_integer_leaves_beside_floating_ones_are_kept() -> None:
    tree = {"w": torch.ones(2, dtype=F64), "n": torch.tensor(3), "on": torch.tensor(True)}

    def f(p: Any) -> Tensor:
        return torch.where(p["on"], p["n"] * p["w"].sum(), 0.0)

    got = ZeroOrder(Rademacher(), "antithetic", num_samples=4096).estimate(f, tree, seed=0)
    assert got.gradient["n"] is None
    assert got.gradient["on"] is None
    assert ((got.gradient["w"] - 3).abs() < 4 * 3 / 64).all()
    loop = InnerLoop(lambda p: p["n"], lambda p, s, t: (s, f(p)), 1)
    es = full_es(loop, num_pairs=4096, sigma=0.1, directions=Rademacher())
    got, _ = es.estimate(tree, es.init(tree, seed=0))
    assert got.gradient["n"] is None
    assert ((got.gradient["w"] - 3).abs() < 4 * 3 / 64).all()
    with pytest.raises(TypeError, match=r"`params`: expected floating-point .* torch.int64 at 1"):
        seed_replay.estimate(lambda: tree["w"].sum(), [tree["w"], tree["n"]])
    with pytest.raises(ValueError, match="`params`: expected a tree with floating-point"):
        es.estimate(torch.tensor(1), es.init(None, seed=0))


# --- complex numbers ------------------------------------------------------------------------------


def modulus(p: Any) -> Tensor:
    return (p["a"] ** 2).sum() + (p["z"].abs() ** 2).sum() + p["z"].imag.sum()


POINT = {"a": torch.tensor([2.0], dtype=F64), "z": torch.tensor([1 + 1j, 0.5 - 2j])}
EXACT = {"a": torch.tensor([4.0], dtype=F64), "z": torch.tensor([2 + 3j, 1 - 3j])}


def assert_near(got: Any, error: Any) -> None:
    for k, exact in EXACT.items():
        assert got[k].dtype == exact.dtype
        off, bar = (torch.view_as_real(x + 0j) for x in (got[k] - exact, error[k]))
        assert (off.abs() <= 4.5 * bar + 1e-6).all()
        assert bar.max() < 0.5


@pytest.mark.parametrize("conjugated", [False, True])
@pytest.mark.parametrize("directions", [Gaussian(), Orthogonal(2)], ids=name_of)
def test_complex_leaves_get_the_gradient_of_torch(directions: Any, conjugated: bool) -> None:
    point = {**POINT, "z": POINT["z"].conj()} if conjugated else POINT
    f = modulus
    leaves = {k: x.clone().requires_grad_() for k, x in point.items()}
    f(leaves).backward()
    engine = ZeroOrder(directions, "antithetic", num_samples=6000, sigma=0.1)
    got = engine.estimate(f, point, seed=0)
    auto = {k: x.grad for k, x in leaves.items()}
    for x in leaves.values():
        x.grad = None
    value = engine(f)(leaves)
    torch.testing.assert_close(value, f(point))
    value.backward()
    # The real parts, g of them, have the covariance norm(g)^2 I + g g' a direction, and of frames
    # a smaller one.
    parts = {k: torch.view_as_real(g + 0j).double() for k, g in auto.items()}
    square = sum(g.square().sum() for g in parts.values())
    for k, exact in auto.items():
        error = ((square + parts[k].square()) / 6000).sqrt()
        for found in (got.gradient[k], leaves[k].grad):
            assert found.dtype == exact.dtype
            off = torch.view_as_real(found - exact + 0j).double()
            assert (off.abs() < 4 * error).all()


def test_complex_parameters_of_models_and_loops() -> None:
    got = ZeroOrder(Gaussian(), "antithetic", num_samples=4000, sigma=0.1).estimate(
        modulus, POINT, seed=0, surrogate=EXACT
    )
    assert_near(got.gradient, got.standard_error)
    loop = InnerLoop(lambda p: p["a"], lambda p, s, t: (s, modulus(p)), 1)
    es = full_es(loop, num_pairs=4000, sigma=0.1)
    got, _ = es.estimate(POINT, es.init(POINT, seed=0))
    assert_near(got.gradient, got.standard_error)
    p = {k: x.clone() for k, x in POINT.items()}
    g = seed_replay.estimate(lambda: modulus(p), list(p.values()), num_samples=2000, sigma=0.1)
    assert torch.equal(p["z"], POINT["z"])
    got = g.with_error_bars(list(p.values()))
    assert_near(dict(zip(p, got.gradient)), dict(zip(p, got.standard_error)))
    before = p["z"].clone()
    g.add_to_(list(p.values()), 0.5)
    torch.testing.assert_close(p["z"], before + 0.5 * got.gradient[1])
    net = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="LowRank: expected real .* torch.complex64 at `weight`"):
        LowRank().estimate(net, lambda m: m.weight.abs().sum())


def test_complex_outputs_have_the_vector_jacobian_product_of_torch() -> None:
    f = ZeroOrder(Rademacher(), "antithetic", vector_output=True)(lambda x: (1 + 2j) * x)
    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    cotangent = torch.tensor(0.5 - 1j, dtype=torch.complex128)
    (exact,) = torch.autograd.grad((1 + 2j) * x, x, cotangent)
    value = f(x)
    assert value.item() == 3 + 6j
    torch.testing.assert_close(torch.autograd.grad(value, x, cotangent)[0], exact)
    with pytest.raises(TypeError, match="the loss: expected a real number, got torch.complex128"):
        ZeroOrder(Gaussian()).estimate(lambda x: x * 1j, x.detach())


# --- resolution -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "weight", "sigma"),
    [(torch.bfloat16, 100.0, 0.01), (torch.float16, 100.0, 0.01), (torch.float32, 100.0, 1e-6),
     (F64, 1.0, 1e-17), (torch.float16, 0.0, 1e-9)],
)  # fmt: skip
def test_a_perturbation_lost_to_rounding_is_noticed(
    dtype: torch.dtype, weight: float, sigma: float
) -> None:
    x = torch.tensor([1e-3, weight], dtype=dtype)
    net = nn.Linear(2, 1).to(dtype)
    nn.init.constant_(net.weight, weight)
    nn.init.zeros_(net.bias)
    if not weight:
        x = x * 0
    loop = InnerLoop(lambda p: 0 * p["w"], lambda p, s, t: (s, p["w"].sum()), 1)
    es = full_es(loop, num_pairs=2, sigma=sigma)
    match = "sigma above the resolution of the weights"
    leaf = {"w": x.clone().requires_grad_()}
    with pytest.warns(UserWarning, match=rf"{match}.* at \$\[0\]\['w'\]"):
        ZeroOrder(Gaussian(), num_samples=2, sigma=sigma)(lambda p: (3 * p["w"]).sum())(leaf)
    with pytest.warns(UserWarning, match=match):
        ZeroOrder(Gaussian(), num_samples=2, sigma=sigma).estimate(lambda p: (3 * p).sum(), x)
    with pytest.warns(UserWarning, match=rf"{match}.* number 0 of `params`"):
        seed_replay.estimate(lambda: x.sum(), [x], sigma=sigma)
    with pytest.warns(UserWarning, match=rf"{match}.*`weight`"):
        LowRank(sigma=sigma).estimate(net, lambda m: m.weight.sum())
    with pytest.warns(UserWarning, match=rf"{match}.* at \$\['w'\]"):
        es.estimate({"w": x}, es.init(None))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_weights_that_are_not_finite_hide_no_others(value: float) -> None:
    engine = ZeroOrder(Gaussian(), "antithetic", num_samples=2, sigma=0.01)
    leaves = {"a": torch.tensor([value, 1.0]), "b": torch.tensor([-1e9])}
    with pytest.warns(UserWarning, match=r"resolution.*at \$\[0\]\['b'\] 1 of 1 entries"):
        engine.estimate(lambda p: p["b"].sum(), leaves, seed=0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_signs_need_a_finer_resolution_than_normal_directions(dtype: torch.dtype) -> None:
    # sigma = 0.75 of the spacing: signs move a weight by the whole of it, an error of a third
    x = torch.ones(1, dtype=dtype)
    sigma = 0.75 * torch.finfo(dtype).eps
    with pytest.warns(UserWarning, match="resolution"):
        ZeroOrder(Rademacher(), "antithetic", sigma=sigma).estimate(lambda p: p.sum(), x)
    engine = ZeroOrder(Gaussian(), "antithetic", num_samples=20_000, sigma=sigma)
    got = engine.estimate(lambda p: 3 * p.float().sum(), x, seed=0)
    assert abs(got.gradient.item() - 3) < 4 * got.standard_error.item() + 0.05


# --- losses that are not finite -------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, F64], ids=str)
@pytest.mark.parametrize(
    ("losses", "ranks"),
    [
        ([1.0, 2.0, NAN, NAN], [0.0, 1.0, 2.5, 2.5]),
        ([1.0, NAN, 3.0, 2.0], [0.0, 3.0, 2.0, 1.0]),
        ([INF, 1.0, NAN, -INF], [2.5, 1.0, 2.5, 0.0]),
        ([NAN] * 4, [1.5] * 4),
    ],
)
def test_losses_that_are_not_numbers_rank_last(
    losses: list[float], ranks: list[float], dtype: torch.dtype
) -> None:
    x = torch.tensor(losses, dtype=dtype)
    expected = torch.tensor(ranks) / 3 - 0.5
    torch.testing.assert_close(estimators.centered_ranks(x).float(), expected)
    u = estimators.nes_utilities(x)
    assert u.isfinite().all()
    assert abs(u.sum().item()) < 1e-6
    order = torch.tensor(ranks).argsort()
    assert (u[order].diff() >= 0).all()
    assert estimators.z_scores(x).isnan().all()  # there is no mean, and none is invented


def test_z_scores_do_not_depend_on_the_scale() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    for scale in (1e-35, 1e-20, 1e20, 1e35):
        torch.testing.assert_close(estimators.z_scores(x * scale), estimators.z_scores(x))


def test_ranks_of_many_half_precision_losses_are_exact() -> None:
    x = torch.arange(1000).to(torch.int64)
    torch.testing.assert_close(
        estimators.centered_ranks(x), torch.linspace(-0.5, 0.5, 1000, dtype=F64)
    )
    ranks = estimators.centered_ranks(torch.arange(200.0).to(torch.bfloat16))
    torch.testing.assert_close(ranks, torch.linspace(-0.5, 0.5, 200))


def test_truncated_windows_see_one_draw() -> None:
    draws = []

    def start(p: Tensor) -> Tensor:
        return torch.randn(()) + torch.rand(3).sum()

    def step(p: Tensor, s: Tensor, t: int) -> Any:
        draws.append(torch.randn(()).item())
        return s + draws[-1], s * p

    es = truncated_es(InnerLoop(start, step, 4), window=2, num_pairs=2, sigma=0.1)
    state = es.init(None, seed=3)
    for window in range(2):
        draws.clear()
        _, state = es.estimate(torch.tensor(1.0), state)
        assert draws[:2] == draws[2:], window
        assert len(set(draws)) == 2


# --- trees without entries, transforms, options ---------------------------------------------------


@pytest.mark.parametrize("directions", SOURCES[:5], ids=name_of)
@pytest.mark.parametrize("estimator", ALL, ids=name_of)
def test_trees_without_entries(directions: Directions, estimator: Estimator) -> None:
    engine = ZeroOrder(directions, estimator, num_samples=32, generator=torch.Generator())
    got = engine.estimate(lambda p: p.sum(), torch.zeros(0, 3), seed=0)
    assert got.gradient.shape == got.standard_error.shape == (0, 3)
    tree = {"none": torch.zeros(0), "w": torch.ones(2)}
    got = engine.estimate(lambda p: p["none"].sum() + p["w"][0] - p["w"][1], tree, seed=0)
    assert got.gradient["none"].shape == (0,)
    assert got.gradient["w"].isfinite().all()
    assert got.gradient["w"].any()


def test_unsupported_uses_of_an_estimate_raise_a_clear_message() -> None:
    engine = ZeroOrder(Rademacher(), "antithetic", vector_output=True)
    x = torch.ones(2, requires_grad=True)
    value = engine(lambda x: 2 * x)(x)
    with pytest.raises(NotDifferentiableError, match="one cotangent at a time, got a batch"):
        torch.autograd.grad(value, x, torch.eye(2), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="got arguments inside of a vmap"):
        torch.func.vmap(lambda p: engine.estimate(torch.sum, p).gradient)(torch.ones(2, 2))
    for sigma in (torch.tensor(0.1, requires_grad=True), "0.1", None, -1.0):
        with pytest.raises(ValueError, match="`sigma`: expected a"):
            ZeroOrder(Gaussian(), sigma=sigma)
        with pytest.raises(ValueError, match="`sigma`: expected a"):
            LowRank(sigma=sigma)


# --- surrogates -----------------------------------------------------------------------------------


KNOWN = [*SOURCES, torch.distributions.Uniform(-1.0, 1.0), torch.distributions.Normal(0.5, 2.0)]
LINEAR = [e for e in ALL if e.linear and e.name not in ("naive", "central", "spsa")]


@pytest.mark.parametrize("estimator", LINEAR, ids=name_of)
@pytest.mark.parametrize("directions", KNOWN, ids=name_of)
def test_a_surrogate_does_not_change_the_mean(estimator: Estimator, directions: Any) -> None:
    a, h = torch.tensor([1.0, -2.0], dtype=F64), torch.tensor([3.0, 1.0], dtype=F64)
    engine = ZeroOrder(directions, estimator, num_samples=1024)
    x = torch.zeros(2, dtype=F64)
    got = engine.estimate(lambda p: p @ a + 1, x, seed=1, surrogate=h)
    plain = engine.estimate(lambda p: p @ a + 1, x, seed=2)
    error = (got.standard_error**2 + plain.standard_error**2).sqrt()
    assert ((got.gradient - plain.gradient).abs() < 4.5 * error + 1e-9).all()
    assert (error < 3).all()


@pytest.mark.parametrize("directions", [*KNOWN, torch.distributions.Normal(2.0, 1.0)], ids=name_of)
def test_the_second_moment_is_that_of_the_draws(directions: Any) -> None:
    h = [torch.tensor([3.0, 1.0], dtype=F64)]
    source = as_directions(directions)
    z = source.draw(h, 4, 0, 2048)[0]
    draws = (z @ h[0])[:, None] * z
    # Those of a block are not independent: of Sobol's points and frames the error is smaller.
    error = draws.std(0) / len(draws) ** 0.5
    (exact,) = source.second_moment(h)
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()
    assert (error < 0.1 * exact.norm()).all()


@pytest.mark.parametrize("estimator", ALL, ids=name_of)
def test_a_surrogate_that_would_change_the_mean_is_refused(estimator: Estimator) -> None:
    refused: list[Any] = [lambda shape: torch.randn(shape)]
    refused += [] if estimator.linear else [Gaussian(), Rademacher()]
    refused += [SOURCES[-1]] if estimator.name == "spsa" else []
    for directions in refused:
        engine = ZeroOrder(directions, estimator, num_samples=8)
        with pytest.raises(ValueError, match="`surrogate`: expected"):
            engine.estimate(lambda p: p.sum(), torch.zeros(2), surrogate=torch.ones(2))


# --- standard errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [6, 7, 9, 10])
def test_standard_error_with_a_short_last_block(n: int) -> None:
    # Frames of three orthogonal directions: v(1) = |a|^2 + a_i^2, v(3) from the lengths alone.
    a = torch.tensor([3.0, -1.0, 0.5], dtype=F64)
    engine = ZeroOrder(Orthogonal(3), "antithetic", num_samples=n, sigma=1.0)
    draws, bars = [], []
    for seed in range(300):
        got = engine.estimate(lambda p: p @ a, torch.zeros(3, dtype=F64), seed=seed)
        draws.append(got.gradient)
        bars.append(got.standard_error.square())
    q, r = divmod(n, 3)
    one, three = a @ a + a.square(), 3 * 2 / 5 * (a @ a + 2 * a.square())
    rest = r * one + r * (r - 1) * (three - 3 * one) / 6
    exact = ((q * three + rest) / n**2).sqrt()
    # A standard deviation of 300 draws has a relative error of 600^-1/2 = 4 %, and so has the
    # root of the mean of 300 variances of few blocks, each of them 100 % off or less.
    torch.testing.assert_close(torch.stack(draws).std(0), exact, rtol=0.15, atol=0.0)
    torch.testing.assert_close(torch.stack(bars).mean(0).sqrt(), exact, rtol=0.2, atol=0.0)


@pytest.mark.parametrize("r", [0, 1, 2, 3])
def test_standard_error_is_the_formula_of_its_docstring(r: int) -> None:
    m, q = 4, 3
    n = q * m + r
    weights = torch.randn(n, dtype=F64)
    directions = torch.randn(n, 2, dtype=F64)
    x = weights[:, None] * directions
    spread = Spread([x[0]], m, n)
    spread.add(0, weights[: 2 * m], directions[: 2 * m])  # chunks begin at a block
    spread.add(0, weights[2 * m :], directions[2 * m :])
    of_one, of_block = x.var(0), x[: q * m].reshape(q, m, 2).sum(1).var(0)
    covariance = (of_block - m * of_one) / (m * (m - 1))
    rest = (r * of_one + r * (r - 1) * covariance).clamp(min=0)
    assert r < 2 or (rest > 0).any()
    (found,) = spread.standard_error([x.mean(0)])
    torch.testing.assert_close(found, (q * of_block + rest).sqrt() / n)


def test_the_error_of_samples_that_agree_is_nothing_and_a_number() -> None:
    # A variance that rounding makes negative has no root.
    for k in range(1, 40):
        slope = torch.tensor(k / 7, dtype=F64)
        engine = ZeroOrder(Rademacher(), "antithetic", num_samples=k + 2, sigma=0.1)
        got = engine.estimate(lambda p, slope=slope: slope * p, torch.zeros((), dtype=F64), seed=k)
        assert got.standard_error < 1e-6
        assert got.standard_error >= 0


def test_standard_error_of_loops_with_coupled_directions() -> None:
    loop = InnerLoop(torch.zeros_like, lambda p, s, t: (s, p[0] - 2 * p[1]), 1)
    es = full_es(loop, num_pairs=32, sigma=0.1, directions=Orthogonal(2))
    draws, bars = [], []
    for seed in range(200):
        got, _ = es.estimate(torch.ones(2, dtype=F64), es.init(None, seed=seed))
        draws.append(got.gradient)
        bars.append(got.standard_error.square())
    # 400^-1/2 = 5 % for the one, less for the mean of variances of 16 blocks.
    true, said = torch.stack(draws).std(0), torch.stack(bars).mean(0).sqrt()
    torch.testing.assert_close(said, true, rtol=0.2, atol=0.0)
