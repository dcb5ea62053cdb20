# SPDX-License-Identifier: Apache-2.0
"""Calls return the documented classes, whose fields have the documented values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt import base, distributed, errors, linear_solve, solvers, visual
from torchopt.diff import explicit, implicit, verify, zero_order
from torchopt.diff.zero_order import error_bars, estimators, low_rank, seed_replay, unrolled
from torchopt.kernels import buffers
from torchopt.transform import scale

F64 = torch.float64
A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=F64)
B = torch.tensor([1.0, -1.0], dtype=F64)


def square(p: Any, target: Any = None) -> Tensor:
    return ((p["w"] - (0.0 if target is None else target)) ** 2).sum()


def weights() -> dict[str, Tensor]:
    return {"w": torch.ones(2, dtype=F64, requires_grad=True)}


def inner_result() -> Any:
    result = torchopt.inner_loop(square, torchopt.sgd(0.25), steps=2)(weights())
    assert result.losses.tolist() == [2.0, 0.5]
    assert result.params["w"].tolist() == [0.25, 0.25]
    return result


def gradient_report() -> Any:
    reports: list[Any] = []

    @implicit.custom_root(lambda x, a: x**3 - a, argnums=1, report=reports.append)
    def cube_root(x: Tensor, a: Tensor) -> Tensor:
        return a ** (1 / 3)

    cube_root(B, torch.tensor([8.0, 27.0], dtype=F64, requires_grad=True)).sum().backward()
    assert reports[0].gradient_error < 1e-12
    return reports[0]


def estimate() -> Any:
    engine = zero_order.ZeroOrder(zero_order.FromDistribution(torch.randn), num_samples=4)
    found = engine.estimate(square, weights(), seed=0)
    assert found.gradient["w"].shape == (2,)
    return found


def low_rank_noise() -> Any:
    noise = low_rank.LowRank(1).noise({"w": torch.ones(3, 2)}, 0, 0, 5)
    assert type(noise.factors["w"]) is low_rank.Factors
    assert noise.materialize({"w": torch.ones(3, 2)})["w"].shape == (5, 3, 2)
    return noise


def seed_gradient() -> Any:
    p = torch.ones(3, dtype=F64)
    found = seed_replay.estimate(lambda: (p**2).sum(), [p], num_samples=4, sigma=0.1, seed=0)
    assert found.coefficients.shape == (4,)
    return found


def particles() -> Any:
    loop = unrolled.InnerLoop(lambda p: p["w"] * 1, lambda p, s, t: (s, (s * p["w"]).sum()), 4)
    es = unrolled.full_es(loop, num_pairs=2, sigma=0.1)
    assert isinstance(es, unrolled.UnrolledEstimator)
    found, state = es.estimate(weights(), es.init(weights(), 0))
    assert isinstance(found, zero_order.GradientEstimate)
    return state


def solution() -> Any:
    operator = linear_solve.LinearOperator.from_matrix(A, linear_solve.Tag.POSITIVE_DEFINITE)
    found = linear_solve.linear_solve(operator, B, linear_solve.Cholesky())
    torch.testing.assert_close(found.value, torch.linalg.solve(A, B))
    return found


def program() -> Any:
    found = solvers.quadratic_program(A, B)
    torch.testing.assert_close(found.x, -torch.linalg.solve(A, B))
    return found


def fixed_point() -> Any:
    found = solvers.FixedPointIteration(tol=1e-12).run(lambda x: 0.5 * x + 1, B)
    assert solvers.SolveStatus(int(found.status)) is solvers.SolveStatus.CONVERGED
    return found


def meta_step() -> Any:
    @distributed.auto_init_rpc()
    def one_step() -> Any:
        assert distributed.get_backend() == "local"
        p = weights()
        found = distributed.TaskParallel(list(p.values())).backward(
            lambda target: square(p, target), [1.0, 2.0]
        )
        assert found.losses.tolist() == [0.0, 2.0]
        return found

    assert distributed.get_backend() is None
    try:
        return one_step()
    finally:
        distributed.shutdown()  # otherwise the world would remain open for the next tests


RETURNED: dict[str, tuple[type, Callable[[], Any]]] = {
    "chain": (base.ChainedGradientTransformation, lambda: torchopt.chain(scale(2.0), scale(3.0))),
    "identity": (base.IdentityGradientTransformation, base.identity),
    "inner_loop": (explicit.InnerResult, inner_result),
    "custom_root": (implicit.GradientReport, gradient_report),
    "zero_order": (error_bars.GradientEstimate, estimate),
    "low_rank": (low_rank.LowRankNoise, low_rank_noise),
    "seed_replay": (seed_replay.SeedGradient, seed_gradient),
    "unrolled": (unrolled.ParticleState, particles),
    "linear_solve": (
        linear_solve.Solution,
        lambda: linear_solve.linear_solve(A, B, linear_solve.LU()),
    ),
    "stats": (linear_solve.Stats, lambda: linear_solve.linear_solve(A, B, linear_solve.LU()).stats),
    "quadratic_program": (solvers.QPSolution, program),
    "fixed_point": (solvers.SolveResult, fixed_point),
    "share": (distributed.Shared, lambda: distributed.share(weights())),
    "wire_stats": (distributed.WireStats, distributed.wire_stats),
    "usage": (buffers.Usage, buffers.usage),
    "meta_step": (distributed.MetaStep, meta_step),
    "graph": (visual.Graph, lambda: visual.make_graph(weights()["w"].sum())),
}


@pytest.mark.parametrize("name", RETURNED)
def test_a_call_returns_the_documented_class(name: str) -> None:
    documented, call = RETURNED[name]
    assert type(call()) is documented


def test_a_checked_loop_reports_each_comparison() -> None:
    loop = torchopt.inner_loop(
        square, torchopt.sgd(0.25), steps=2, verify=verify.Verify(explicit.Explicit(), 1.0)
    )
    loop(weights()).params["w"].sum().backward()
    assert type(loop.report) is verify.VerifyReport
    (comparison,) = loop.report.checks
    assert type(comparison) is verify.Verification
    assert comparison.call == 0
    assert comparison.cosine == pytest.approx(1.0, abs=1e-15)
    assert verify.checked(loop, (weights(),), {}).losses.tolist() == [2.0, 0.5]
    with pytest.raises(TypeError, match="expected an engine over an inner problem"):
        verify.checked(explicit.Explicit(), (weights(),), {})


def test_errors_of_the_package_have_one_base() -> None:
    own = [getattr(errors, name) for name in errors.__all__]
    raised = [e for e in own if issubclass(e, Exception) and not issubclass(e, Warning)]
    assert len(raised) > 5
    assert all(issubclass(e, errors.TorchOptError) for e in raised)
    assert not issubclass(errors.MissingExtensionWarning, errors.TorchOptError)


def test_the_spread_of_directions_is_their_sample_variance() -> None:
    """One direction per block: the error of a mean is s / sqrt(n); two: that of the pair sums."""
    weights = torch.tensor([1.0, -3.0, 2.0, 5.0], dtype=F64) * 1e200  # squares overflow
    z = torch.randn(4, 3, dtype=F64)
    unit, largest = error_bars.scaled(weights)
    torch.testing.assert_close(unit, weights / 5e200, rtol=1e-15, atol=0)
    assert largest.item() == pytest.approx(5e200, rel=1e-15)
    for coupled in (1, 2):
        spread = error_bars.Spread([z[0]], coupled, 4)
        small = weights / 1e200
        spread.add(0, small, z)
        terms = (small[:, None] * z).unflatten(0, (-1, coupled)).mean(1)
        exact = terms.std(0) / len(terms) ** 0.5
        (found,) = spread.standard_error([terms.mean(0)])
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)


def test_estimators_are_found_by_name_and_declare_whether_they_are_linear() -> None:
    for name, estimator in estimators.ESTIMATORS.items():
        assert estimators.as_estimator(name) is estimator
        assert estimators.as_estimator(estimator) is estimator
        estimators.require_linear(estimator)
    with pytest.raises(ValueError, match="`method`: expected one of 'naive'.*got 'sobol'"):
        estimators.as_estimator("sobol")
    with pytest.raises(ValueError, match="linear in the losses"):
        estimators.require_linear(estimators.shaped(estimators.naive, torch.sign))


def test_parameters_are_perturbed_by_the_direction_of_a_seed() -> None:
    p = torch.linspace(-1e-20, 1.0, 4)
    before = p.clone()
    found = seed_replay.estimate(lambda: p.sum(), [p], method="naive", num_samples=2, seed=3)
    directions = [torch.zeros_like(p) for _ in range(2)]
    for member, z in enumerate(directions):
        with seed_replay.perturbed([p], 3, member, 0.5):
            z.copy_((p - before) / 0.5)
        assert torch.equal(p, before)
    mean = sum(c * z for c, z in zip(found.coefficients, directions)) / 2
    torch.testing.assert_close(found.materialize([p])[0], mean, rtol=1e-5, atol=1e-6)
