# SPDX-License-Identifier: Apache-2.0
"""Functions with an estimated derivative: statistics against closed forms, and the contract."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import torchopt
from torchopt.diff import zero_order
from torchopt.diff.zero_order import Gaussian, ZeroOrder
from torchopt.errors import NotDifferentiableError

F64 = torch.float64
METHODS = ("naive", "forward", "antithetic")
A = torch.tensor([3.0, -1.0, 0.5], dtype=F64)


def linear(x: Tensor) -> Tensor:
    return A @ x + 10.0


def gradient(fn: Callable[..., Any], *args: Any) -> Tensor:
    x = args[0].clone().requires_grad_()
    return torch.autograd.grad(fn(x, *args[1:]), x)[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_unbiased_on_a_linear_function(method: str, sigma: float) -> None:
    engine = ZeroOrder(Gaussian(), method, num_samples=100_000, sigma=sigma)
    result = engine.estimate(linear, torch.zeros(3, dtype=F64), seed=1)
    assert ((result.gradient - A).abs() < 4 * result.standard_error).all()
    # and the error bar is that of the closed form: the covariance of one direction is
    # norm(a)^2 I + a a', for naive plus (offset / sigma)^2 I
    offset = 10.0 / sigma if method == "naive" else 0.0
    exact = ((A @ A + A.square() + offset**2) / 100_000).sqrt()
    # A variance of products of two normals has a relative error of at most (14 / n)^1/2, its root
    # half of it.
    error = 2 * (14 / 100_000) ** 0.5
    torch.testing.assert_close(result.standard_error, exact, rtol=error, atol=0.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_scalar_golden_number(method: str, sigma: float) -> None:
    # 3 x + 10 at 0: the expectation is 3 for every sigma, with the published call signature too
    @zero_order(torch.distributions.Normal(0.0, 1.0), method, (0,), 20_000, sigma)
    def f(x: Tensor) -> Tensor:
        return 3.0 * x + 10.0

    got = gradient(f, torch.zeros((), dtype=F64))
    offset = 10.0 / sigma if method == "naive" else 0.0
    error = ((2 * 9.0 + offset**2) / 20_000) ** 0.5
    assert abs(got.item() - 3.0) < 4 * error


def test_baseline_of_forward_differences_is_the_value_at_the_point() -> None:
    # Each sample must be compared with f(theta), whatever the sample before it was.
    noise = Gaussian().draw([torch.zeros(3, dtype=F64)], seed=5, start=0, stop=4)[0]
    result = ZeroOrder(Gaussian(), "forward", num_samples=4, sigma=0.1).estimate(
        linear, torch.ones(3, dtype=F64), seed=5
    )
    expected = ((noise @ A)[:, None] * noise).mean(0)
    torch.testing.assert_close(result.gradient, expected, rtol=1e-10, atol=1e-10)
    assert result.evaluations == 5


def test_second_order_terms() -> None:
    # f = x'Hx/2 at x: antithetic is H x exactly unbiased; forward too (odd moments vanish).
    H = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]], dtype=F64)
    x = torch.tensor([1.0, -2.0, 0.7], dtype=F64)
    for method in METHODS:
        result = ZeroOrder(Gaussian(), method, num_samples=100_000, sigma=0.5).estimate(
            lambda p: 0.5 * p @ H @ p, x, seed=2
        )
        assert ((result.gradient - H @ x).abs() < 4 * result.standard_error).all()


def test_cubic_bias_is_three_sigma_squared() -> None:
    # E[((x + s z)^3 - (x - s z)^3) z] / (2 s) = 3 x^2 + 3 s^2
    for sigma in (0.5, 1.0):
        result = ZeroOrder(Gaussian(), "antithetic", num_samples=100_000, sigma=sigma).estimate(
            lambda p: (p**3).sum(), torch.tensor([1.0, 2.0], dtype=F64), seed=3
        )
        exact = 3 * torch.tensor([1.0, 4.0], dtype=F64) + 3 * sigma**2
        assert ((result.gradient - exact).abs() < 4 * result.standard_error).all()
        assert (3 * sigma**2 > 4 * result.standard_error).all()  # the bias is visible


# --- the contract ---------------------------------------------------------------------------------


def test_the_module_is_the_function() -> None:
    assert callable(zero_order)
    assert zero_order.decorator.zero_order is zero_order.zero_order
    assert zero_order.nn.ZeroOrderGradientModule is zero_order.ZeroOrderGradientModule
    decorated = zero_order(lambda shape: torch.randn(shape))(linear)
    assert decorated(torch.zeros(3, dtype=F64)).item() == 10.0


# What inspect.signature says of the published torchopt 0.7.3, without annotations.
SIGNATURES = {
    "zero_order": "(distribution, method='naive', argnums=(0,), num_samples=1, sigma=1.0)",
    "ZeroOrderGradientModule": "(*args, **kwargs)",
    "ZeroOrderGradientModule.forward": "(self, *args, **kwargs)",
    "ZeroOrderGradientModule.sample": "(self, sample_shape=torch.Size([]))",
    "nn.module.enable_zero_order_gradients": "(cls, method='naive', num_samples=1, sigma=1.0)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_positions_and_defaults_are_those_of_the_published_package(name: str) -> None:
    found = inspect.signature(functools.reduce(getattr, name.split("."), zero_order))
    ours = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    published = SIGNATURES[name]
    count = published.count(",") + 1 - (name == "zero_order")  # the comma in (0,)
    first = inspect.Signature(ours[:count])
    assert str(first) == published
    # our additional parameters are optional
    assert all(p.kind is p.KEYWORD_ONLY or p.default is not p.empty for p in ours[count:])


def test_names_of_the_published_package() -> None:
    assert torchopt.nn.ZeroOrderGradientModule is zero_order.ZeroOrderGradientModule
    assert torchopt.diff.ZeroOrderGradientModule is zero_order.ZeroOrderGradientModule
    assert torchopt.diff.zero_order is zero_order
    assert issubclass(zero_order.ZeroOrderGradientModule, torchopt.typing.Samplable)
    assert issubclass(zero_order.ZeroOrderGradientModule, torch.nn.Module)
    assert {"Samplable", "SampleFunc", "Distribution"} <= set(dir(torchopt.typing))


def test_error_texts() -> None:
    x = torch.zeros(3)
    with pytest.raises(TypeError, match="`distribution` must be a callable or an instance of"):
        zero_order(3)
    with pytest.raises(TypeError, match="`output` must be a tensor."):
        zero_order(torch.randn)(lambda x: 1.0)(x)
    with pytest.raises(RuntimeError, match="`output` must be a scalar tensor."):
        zero_order(torch.randn)(lambda x: x)(x)
    with pytest.raises(ValueError, match="`method`: expected one of 'naive', 'forward'"):
        zero_order(torch.randn, "reverse")
    with pytest.raises(ValueError, match="`num_samples`: expected an integer of at least 1, got 0"):
        zero_order(torch.randn, num_samples=0)
    with pytest.raises(ValueError, match="`sigma`: expected a positive number"):
        zero_order(torch.randn, sigma=-1.0)
    for argnums in ((), (0, 0), True, 1.0, "x"):
        with pytest.raises(ValueError, match="`argnums`: expected one or more different positions"):
            zero_order(torch.randn, argnums=argnums)
    with pytest.raises(ValueError, match="`argnums`: expected different positions of the 1"):
        zero_order(torch.randn, argnums=(0, -1))(linear)(x)
    for sigma in (float("inf"), float("nan"), 0.0):
        with pytest.raises(ValueError, match="`sigma`: expected a positive number"):
            zero_order(torch.randn, sigma=sigma)
    with pytest.raises(ValueError, match="`argnums`: expected positions of the 1 positional"):
        zero_order(torch.randn, argnums=1)(linear)(x)
    with pytest.raises(ValueError, match="found none"):
        zero_order(torch.randn)(lambda x: x)("text")
    with pytest.raises(TypeError, match="a pair \\(output, aux\\)"):
        zero_order(torch.randn, has_aux=True)(lambda x: x.sum())(x)
    wrong = zero_order(lambda shape: torch.randn(7))(lambda x: x.sum())
    with pytest.raises(ValueError, match=r"a tensor of shape \[3\].* got \[7\]"):
        gradient(wrong, x)


def test_trees_keywords_and_other_arguments() -> None:
    @zero_order(Gaussian(), "antithetic", argnums=(0, 2), num_samples=3, sigma=0.2)
    def f(params: dict[str, Any], scale: Tensor, shift: Tensor, *, power: int, mask: Tensor) -> Any:
        (w, b) = params["layer"]
        return scale * ((w * mask) ** power).sum() + b + (shift * mask).sum()

    w, b = torch.ones(2, dtype=F64, requires_grad=True), torch.ones((), requires_grad=True)
    scale = torch.tensor(2.0, dtype=F64, requires_grad=True)
    shift = torch.zeros(2, dtype=F64, requires_grad=True)
    mask = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
    value = f({"layer": (w, b), "name": "n"}, scale, shift, power=1, mask=mask)
    assert value.item() == 3.0
    grads = torch.autograd.grad(value, [w, b, shift, scale, mask], allow_unused=True)
    assert [g is None for g in grads] == [False, False, False, True, True]
    assert grads[1].dtype == torch.float32
    # one joint direction: the same scalar difference multiplies every leaf's noise
    values = ZeroOrder(Gaussian(), "antithetic", num_samples=1).estimate(
        lambda p, q: p.sum() + q.sum(), w, shift, seed=0
    )
    assert values.gradient.shape == (2,)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
@pytest.mark.parametrize("vectorized", [True, False])
def test_gradient_depends_on_the_seed_alone(method: str, chunk_size: int, vectorized: bool) -> None:
    x = torch.tensor([1.0, -1.0, 0.3], dtype=F64)

    def run(seed: int, **options: Any) -> Tensor:
        f = zero_order(
            torch.distributions.Normal(0.0, 1.0),
            method,
            num_samples=7,
            sigma=0.1,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )(lambda p: torch.sin(p).prod())
        return gradient(f, x)

    reference = run(3)
    got = run(3, chunk_size=chunk_size, vectorized=vectorized)
    torch.testing.assert_close(got, reference, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(run(4), reference)


def test_noise_is_settled_in_the_forward_pass() -> None:
    x = torch.ones(3, dtype=F64, requires_grad=True)
    value = zero_order(torch.randn, num_samples=3)(linear)(x)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    torch.manual_seed(99)
    (second,) = torch.autograd.grad(value, x)
    assert torch.equal(first, second)
    # and the backward pass leaves the global generator alone
    state = torch.get_rng_state()
    value = zero_order(torch.randn, generator=torch.Generator())(linear)(x)
    value.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_new_call_new_noise() -> None:
    f = zero_order(torch.randn)(linear)
    x = torch.ones(3, dtype=F64)
    assert not torch.equal(gradient(f, x), gradient(f, x))


def test_incoming_cotangent_scales_the_estimate() -> None:
    options = {"num_samples": 5, "method": "antithetic"}
    x = torch.ones(3, dtype=F64)
    plain = zero_order(Gaussian(), generator=torch.Generator().manual_seed(1), **options)(linear)
    scaled = zero_order(Gaussian(), generator=torch.Generator().manual_seed(1), **options)(linear)
    torch.testing.assert_close(gradient(lambda p: -2 * scaled(p), x), -2 * gradient(plain, x))


def test_vector_output_is_a_vector_jacobian_product() -> None:
    J = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]], dtype=F64)
    f = zero_order(Gaussian(), "antithetic", num_samples=50_000, vector_output=True)(
        lambda x: J @ x
    )
    x = torch.zeros(3, dtype=F64, requires_grad=True)
    v = torch.tensor([2.0, -1.0], dtype=F64)
    (got,) = torch.autograd.grad(f(x), x, v)
    truth = J.T @ v
    error = ((truth @ truth + truth.square()) / 50_000).sqrt()
    assert ((got - truth).abs() < 4 * error).all()


def test_aux_is_detached_and_keeps_its_tree() -> None:
    @zero_order(Gaussian(), has_aux=True)
    def f(x: Tensor) -> Any:
        return x.sum(), {"double": 2 * x, "same": x, "count": torch.tensor(3), "name": "n"}

    x = torch.ones(2, dtype=F64, requires_grad=True)
    value, aux = f(x)
    assert aux["name"] == "n"
    assert aux["count"].item() == 3
    assert torch.equal(aux["double"], 2 * x.detach())
    assert torch.equal(aux["same"], x.detach())
    assert not any(leaf.requires_grad for leaf in (aux["double"], aux["same"]))
    value.backward()
    assert x.grad.shape == (2,)


@pytest.mark.parametrize(
    ("directions", "method"),
    [
        (zero_order.Rademacher(), "antithetic"),
        (lambda shape: torch.randn(shape), "antithetic"),
        (Gaussian(), "spsa"),
        (Gaussian(), "optimal_baseline"),
        (Gaussian(), zero_order.estimators.multi_point(2)),
        (Gaussian(), zero_order.estimators.shaped(zero_order.estimators.naive)),
    ],
)
def test_second_derivatives_that_are_not_defined_raise(directions: Any, method: Any) -> None:
    f = zero_order(directions, method, num_samples=2)(linear)
    x = torch.ones(3, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    with pytest.raises(NotDifferentiableError, match="a second derivative is defined for"):
        g.sum().backward()


def test_third_and_forward_mode_derivatives_raise() -> None:
    f = zero_order(Gaussian(), num_samples=2)(linear)
    x = torch.ones(3, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    with pytest.raises(NotDifferentiableError, match="a third"):
        h.sum().backward()
    with pytest.raises(NotDifferentiableError, match="Use reverse mode"):
        torch.func.jvp(f, (x.detach(),), (x.detach(),))
    with pytest.raises(NotDifferentiableError, match="jacrev"):
        torch.func.hessian(f)(x.detach())


def test_under_function_transforms() -> None:
    # quadratic in one dimension with Rademacher directions: the antithetic estimate is exact
    f = zero_order(zero_order.Rademacher(), "antithetic", vectorized=True)(lambda x, s: s * x * x)
    x = torch.tensor([1.0, -2.0, 3.0], dtype=F64)
    s = torch.tensor(2.0, dtype=F64)
    torch.testing.assert_close(torch.func.grad(f)(x[0], s), torch.tensor(4.0, dtype=F64))
    batched = torch.func.vmap(torch.func.grad(f), in_dims=(0, None))(x, s)
    torch.testing.assert_close(batched, 4 * x)
    _, pull = torch.func.vjp(lambda p: f(p, s), x[1])
    torch.testing.assert_close(pull(torch.tensor(3.0, dtype=F64))[0], 12 * x[1])


def test_functions_that_vmap_cannot_run_are_looped_over_after_one_warning() -> None:
    def f(x: Tensor) -> Tensor:
        return x.sum() if x.sum().item() > 0 else -x.sum()

    auto = zero_order(Gaussian(), "antithetic", num_samples=4)(f)
    x = torch.ones(3, dtype=F64)
    with pytest.warns(UserWarning, match="torch.func.vmap cannot take this function"):
        gradient(auto, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(auto, x)
        gradient(zero_order(Gaussian(), num_samples=4, vectorized=False)(f), x)
    with pytest.raises(RuntimeError, match="vmap"):
        gradient(zero_order(Gaussian(), num_samples=4, vectorized=True)(f), x)


def test_errors_of_the_function_itself_come_through() -> None:
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("mine")
        return x.sum()

    with pytest.raises(ValueError, match="mine"):
        gradient(zero_order(Gaussian())(f), torch.ones(2))


def test_a_distribution_that_cannot_be_replayed_is_reported() -> None:
    counter = iter(range(1000))

    def drifting(shape: torch.Size) -> Tensor:
        return torch.full(shape, float(next(counter)))

    f = zero_order(drifting, "leave_one_out", num_samples=4, chunk_size=2)(linear)
    with pytest.raises(RuntimeError, match="Draw from torch's random generators"):
        gradient(f, torch.ones(3, dtype=F64))


def test_random_draws_inside_the_function_are_common() -> None:
    # A random offset drawn anew for each evaluation would dominate the difference.
    def f(x: Tensor) -> Tensor:
        return x.sum() + 1e6 * torch.randn((), dtype=F64)

    for vectorized in (True, False):
        got = ZeroOrder(
            Gaussian(), "antithetic", num_samples=2000, sigma=0.1, vectorized=vectorized
        ).estimate(f, torch.zeros(2, dtype=F64), seed=0)
        assert (got.standard_error < 0.1).all()
        assert ((got.gradient - 1.0).abs() < 4 * got.standard_error).all()


def test_surrogate_removes_the_variance_it_explains() -> None:
    engine = ZeroOrder(Gaussian(), "antithetic", num_samples=50)
    exact = engine.estimate(linear, torch.zeros(3, dtype=F64), surrogate=A, seed=0)
    torch.testing.assert_close(exact.gradient, A, rtol=1e-12, atol=1e-12)
    assert (exact.standard_error < 1e-12).all()
    rough = engine.estimate(linear, torch.zeros(3, dtype=F64), surrogate=0.9 * A, seed=0)
    plain = engine.estimate(linear, torch.zeros(3, dtype=F64), seed=0)
    torch.testing.assert_close(rough.standard_error, 0.1 * plain.standard_error)
    with pytest.raises(ValueError, match="`surrogate`: expected leaves of shapes"):
        engine.estimate(linear, torch.zeros(3, dtype=F64), surrogate=A[:2])


# The compiler reads .grad of intermediate tensors, which causes a warning of torch.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_caller_gets_the_eager_result() -> None:
    f = zero_order(zero_order.Rademacher(), "antithetic")(lambda x: x * x)

    @torch.compile(backend="eager")
    def loss(x: Tensor) -> Tensor:
        return f(2 * x) + 1.0

    x = torch.tensor(3.0, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(g, torch.tensor(24.0, dtype=F64))


@pytest.mark.parametrize("name", [*zero_order.estimators.ESTIMATORS, "shaped"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_estimators_compile_as_one_graph(name: str) -> None:
    pair = zero_order.estimators.shaped(zero_order.estimators.antithetic)
    estimator = zero_order.estimators.ESTIMATORS.get(name, pair)

    def generation(x: Tensor, z: Tensor) -> Tensor:
        batched = torch.func.vmap(lambda p: torch.sin(p).prod())
        losses = torch.stack([batched(x + s * 0.1 * z) for s in estimator.offsets], dim=1)
        return x - 0.1 * estimator(losses, z, 0.1, center=torch.sin(x).prod())

    compiled = torch.compile(generation, backend="eager", fullgraph=True)
    x, z = torch.ones(3, dtype=F64), torch.randn(6, 3, dtype=F64)
    torch.testing.assert_close(compiled(x, z), generation(x, z))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_one_graph_around_an_estimate_is_refused_by_the_compiler() -> None:
    f = zero_order(Gaussian(), "antithetic")(lambda x: x * x)
    compiled = torch.compile(lambda x: f(x), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        compiled(torch.tensor(3.0, dtype=F64))


def test_a_function_that_overwrites_its_argument_leaves_the_point_alone() -> None:
    for method in METHODS:
        for vectorized in (True, False):
            x = torch.ones(3, dtype=F64)
            engine = ZeroOrder(Gaussian(), method, num_samples=4, vectorized=vectorized)
            got = engine.estimate(lambda p: p.mul_(2.0) @ A, x, seed=0)
            assert torch.equal(x, torch.ones(3, dtype=F64))
            torch.testing.assert_close(got, engine.estimate(lambda p: 2.0 * p @ A, x, seed=0))


def test_a_nan_loss_appears_in_the_estimate() -> None:
    got = ZeroOrder(Gaussian(), num_samples=4).estimate(
        lambda p: p.sum() * float("nan"), torch.ones(3)
    )
    assert got.gradient.isnan().all()
    assert got.standard_error.isnan().all()
    assert math.isnan(got.effective_sample_size)


def test_torch_distributions_are_recognised() -> None:
    like = [torch.zeros(2, 3, dtype=F64), torch.zeros(5000)]
    as_directions = zero_order.directions.as_directions
    for normal in (torch.distributions.Normal(0.0, 1.0), torch.randn, Gaussian()):
        assert as_directions(normal) == Gaussian()
    other = as_directions(torch.distributions.Laplace(0.0, 0.5**0.5))
    assert other.independent
    whole, part = other.draw(like, 3, 0, 9), other.draw(like, 3, 4, 6)
    assert [x.dtype for x in whole] == [F64, torch.float32]
    for x, y in zip(whole, part):
        assert torch.equal(x[4:6], y)
    (z,) = other.draw(like[:1], 1, 0, 20_000)
    assert (
        (z.flatten(1).T @ z.flatten(1) / 20_000 - torch.eye(6)).abs() < 4 * (5 / 20_000) ** 0.5
    ).all()
    shifted = as_directions(torch.distributions.Normal(torch.zeros(3), torch.ones(3)))
    with pytest.raises(ValueError, match=r"a tensor of shape \[3\].* got \[3, 3\]"):
        shifted.draw([torch.zeros(3)], 0, 0, 1)


# --- shares of workers ----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*zero_order.estimators.ESTIMATORS])
@pytest.mark.parametrize("directions", [Gaussian(), zero_order.Orthogonal(2)], ids=repr)
def test_workers_exchange_only_a_seed_and_losses(method: str, directions: Any) -> None:
    engine = ZeroOrder(directions, method, argnums=(1, 0), num_samples=10, sigma=0.2, chunk_size=4)
    args = ({"a": torch.ones(3, dtype=F64)}, torch.tensor(2.0, dtype=F64))

    def f(p: Any, q: Tensor, *, shift: float) -> Tensor:
        return torch.sin(q * p["a"] + shift).prod() + 0.1 * torch.randn((), dtype=F64)

    whole = engine.estimate(f, *args, seed=4, shift=0.3)
    shares = [
        engine.losses(f, *args, seed=4, start=i, stop=j, shift=0.3)
        for i, j in ((0, 2), (2, 8), (8, 10))
    ]
    assert [s.shape for s in shares] == [(k, len(engine.estimator.offsets)) for k in (2, 6, 2)]
    center = engine.center(f, *args, seed=4, shift=0.3) if engine.estimator.uses_center else None
    together = engine.combine(torch.cat(shares), *args, seed=4, center=center)
    torch.testing.assert_close(together, whole)


def test_wrong_shares_are_reported() -> None:
    engine = ZeroOrder(zero_order.Orthogonal(2), "forward", num_samples=10)
    x = torch.ones(3, dtype=F64)
    for start, stop in ((1, 4), (4, 4), (0, 11), (-2, 2)):
        with pytest.raises(ValueError, match="`start`, `stop`: expected 0 <= start < stop"):
            engine.losses(linear, x, seed=0, start=start, stop=stop)
    with pytest.raises(ValueError, match=r"`losses`: expected shape \[10, 1\].* got \[9, 1\]"):
        engine.combine(torch.ones(9, 1), x, seed=0)
    with pytest.raises(ValueError, match="`center`: forward expected the loss at the point"):
        engine.combine(torch.ones(10, 1), x, seed=0)
