# SPDX-License-Identifier: Apache-2.0
"""Implicit derivatives against closed forms, in float64."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import torchopt
from torchopt.diff.implicit import (
    Implicit,
    ImplicitEngine,
    OptimalityError,
    OptimalityWarning,
    custom_fixed_point,
    custom_root,
    root_jvp,
    root_vjp,
)
from torchopt.diff.zero_order import zero_order
from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve import (
    CG,
    GMRES,
    LSMR,
    LU,
    MINRES,
    BiCGSTAB,
    LinearSolveError,
    LinearSolveWarning,
    solve_cg,
    solve_inv,
    solve_normal_cg,
)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


@custom_root(lambda x, a: x**3 - a, argnums=1)
def cube_root(start, a):
    return a.abs() ** (1 / 3) * a.sign()


def root_of(a):
    return cube_root(None, a)


def test_cube_root_to_third_order_by_autograd():
    a = tensor(8.0).requires_grad_()
    (first,) = torch.autograd.grad(root_of(a), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a, create_graph=True)
    (third,) = torch.autograd.grad(second, a, retain_graph=True)
    torch.testing.assert_close(first, tensor(1 / 12), rtol=0, atol=1e-14)
    torch.testing.assert_close(second, tensor(-2 / 9 * 8 ** (-5 / 3)), rtol=0, atol=1e-14)
    torch.testing.assert_close(third, tensor(10 / 27 * 8 ** (-8 / 3)), rtol=0, atol=1e-14)
    assert abs(second.detach().item() + 0.006944) < 1e-6


def test_gradcheck_of_the_cube_root():
    a = tensor([8.0, 1.5, -2.0]).requires_grad_()
    assert gradcheck(root_of, (a,), check_forward_ad=True)
    assert gradgradcheck(root_of, (a,))


@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
def test_second_derivative_by_every_pair_of_transforms(outer, inner):
    torch.testing.assert_close(outer(inner(root_of))(tensor(8.0)), tensor(-1 / 144))


FIRST = {
    "grad": grad(root_of),
    "vjp": lambda a: torch.func.vjp(root_of, a)[1](torch.ones_like(a))[0],
    "jvp": lambda a: jvp(root_of, (a,), (torch.ones_like(a),))[1],
    "jacrev": jacrev(root_of),
    "jacfwd": jacfwd(root_of),
    "vmap": lambda a: vmap(grad(root_of))(a[None])[0],
}


@pytest.mark.parametrize("name", sorted(FIRST))
def test_cube_root_of_eight_by_every_transform(name):
    first = FIRST[name]
    torch.testing.assert_close(first(tensor(8.0)), tensor(1 / 12), rtol=0, atol=1e-14)
    for second in (grad(first), hessian(root_of), lambda a: vmap(hessian(root_of))(a[None])[0]):
        torch.testing.assert_close(second(tensor(8.0)), tensor(-1 / 144), rtol=0, atol=1e-14)


def test_transforms_with_vmap():
    a = tensor([1.0, 8.0, 27.0])
    torch.testing.assert_close(vmap(root_of)(a), tensor([1.0, 2.0, 3.0]))
    slope = 1 / (3 * vmap(root_of)(a) ** 2)
    torch.testing.assert_close(vmap(grad(root_of))(a), slope)
    torch.testing.assert_close(grad(lambda a: vmap(root_of)(a).sum())(a), slope)
    curvature = -2 / 9 * a ** (-5 / 3)
    torch.testing.assert_close(vmap(hessian(root_of))(a), curvature)
    torch.testing.assert_close(hessian(lambda a: vmap(root_of)(a).sum())(a), torch.diag(curvature))
    assert torch.allclose(jvp(vmap(root_of), (a,), (torch.ones_like(a),))[1], slope)


@pytest.mark.parametrize("solve", [None, solve_cg(), solve_normal_cg(), solve_inv()])
def test_scalar_solution(solve):
    @custom_root(lambda x, a: x**2 - a, argnums=1, solve=solve)
    def square_root(start, a):
        return a.sqrt()

    torch.testing.assert_close(grad(square_root, 1)(tensor(0.0), tensor(4.0)), tensor(0.25))


# --- ridge ----------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(20, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(20, generator=GENERATOR, dtype=torch.float64)
EYE = torch.eye(5, dtype=torch.float64)


def ridge_weights(lam, X=X, Y=Y):
    return torch.linalg.solve(X.T @ X + 20 * lam * EYE, X.T @ Y)


def ridge_gradient(params, lam, data, **unused):
    def loss(params):
        fit = ((data["X"] @ params["w"] - data["Y"]) ** 2).sum() / 40
        return fit + lam / 2 * (params["w"] ** 2).sum()

    return grad(loss)(params)


LINEAR = {
    "default": None,
    "cg": CG(1e-13),
    "normal_cg": solve_normal_cg(rtol=1e-13),
    "inv": solve_inv(),
    "gmres": GMRES(1e-13),
    "bicgstab": BiCGSTAB(1e-13),
    "minres": MINRES(1e-13),
    "neumann": solve_inv(ns=True, maxiter=400, alpha=0.4),
    "function": lambda matvec, b: solve_cg(rtol=1e-13)(matvec, b),
}


@pytest.fixture(params=LINEAR.values(), ids=LINEAR.keys())
def solve(request):
    return request.param


def test_ridge_with_every_solver(solve):
    @custom_root(ridge_gradient, argnums=1, has_aux=True, solve=solve)
    def fit(params, lam, data, *, note="none"):
        assert not lam.requires_grad or lam.is_leaf
        aux = {"count": torch.tensor(3), "note": note}
        return {"w": ridge_weights(lam, data["X"], data["Y"])}, aux

    def weights(lam):
        out, aux = fit({"w": torch.zeros(5)}, lam, {"X": X, "Y": Y}, note="kept")
        assert aux["note"] == "kept"
        return out["w"]

    lam = tensor(0.3)
    H = X.T @ X / 20 + lam * EYE
    w = ridge_weights(lam)
    first = -torch.linalg.solve(H, w)
    second = 2 * torch.linalg.solve(H, torch.linalg.solve(H, w))
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(weights)(lam), first, rtol=1e-8, atol=1e-10)
        for inner in (jacrev, jacfwd):
            found = transform(inner(weights))(lam)
            torch.testing.assert_close(found, second, rtol=1e-8, atol=1e-10)
    batch = tensor([0.1, 0.3])
    each = torch.stack([jacrev(weights)(lam) for lam in batch])
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(vmap(transform(weights))(batch), each, rtol=1e-8, atol=1e-10)
    around = jacrev(vmap(weights))(batch)
    torch.testing.assert_close(around[1, :, 1], first, rtol=1e-8, atol=1e-10)
    assert around[1, :, 0].abs().max() == 0


def test_gradient_with_respect_to_data_and_any_argnums():
    def optimality(w, unused, lam, X, Y):
        return X.T @ (X @ w - Y) + 20 * lam * w

    for argnums in ((2, 4), (4, 2), (2, 3, 4)):

        @custom_root(optimality, argnums=argnums)
        def fit(w, unused, lam, X, Y):
            return ridge_weights(lam, X, Y)

        inputs = [tensor(0.3), X.clone(), Y.clone()]
        names = [i for i in (2, 3, 4) if i in argnums]
        chosen = [inputs[i - 2].requires_grad_() for i in names]
        out = fit(torch.zeros(5), "text", *inputs)
        found = torch.autograd.grad(out.sum(), chosen)
        expected = torch.autograd.grad(ridge_weights(*inputs).sum(), chosen)
        torch.testing.assert_close(found, expected)


# --- other closed forms ---------------------------------------------------------------------------


def test_lasso_on_its_support():
    lam = tensor(0.15)

    def soft(z, t):
        return z.sign() * torch.clamp(z.abs() - t, min=0)

    def T(w, lam):
        return soft(w - 0.5 * X.T @ (X @ w - Y) / 20, 0.5 * lam)

    @custom_fixed_point(T, argnums=1)
    def lasso(w, lam):
        for _ in range(3000):
            w = T(w, lam)
        return w

    start = torch.zeros(5, dtype=torch.float64)
    w = lasso(start, lam)
    S = w != 0
    assert 0 < int(S.sum()) < 5
    expected = torch.zeros_like(w)
    expected[S] = -20 * torch.linalg.solve(X[:, S].T @ X[:, S], w[S].sign())
    torch.testing.assert_close(jacrev(lasso, 1)(start, lam), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(jacfwd(lasso, 1)(start, lam), expected, rtol=1e-8, atol=1e-8)


def test_imaml_on_a_quadratic():
    lam = 0.7

    def optimality(phi, theta):
        return X.T @ (X @ phi - Y) + lam * (phi - theta)

    @custom_root(optimality, argnums=1, symmetric=True, positive_definite=True)
    def adapt(start, theta):
        return torch.linalg.solve(X.T @ X + lam * EYE, X.T @ Y + lam * theta)

    theta = torch.ones(5, dtype=torch.float64)
    expected = lam * torch.linalg.inv(X.T @ X + lam * EYE)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(adapt, 1)(theta, theta), expected)


def test_linear_fixed_point():
    W = 0.2 * X[:5] / X[:5].abs().max()
    U = X[5:10]

    def T(z, x):
        return z @ W.T + x @ U.T

    @custom_fixed_point(T, argnums=1)
    def layer(z, x):
        for _ in range(200):
            z = T(z, x)
        return z

    x = X[11]
    expected = torch.linalg.solve(EYE - W, U)
    for transform in (jacrev, jacfwd):
        torch.testing.assert_close(transform(layer, 1)(torch.zeros_like(x), x), expected)


def test_deep_equilibrium_layer_of_the_tutorial():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    x0 = torch.randn(1, 4)

    def apply(x, params):
        return torch.func.functional_call(net, params, (x,))

    @custom_root(lambda x, params: x - apply(x, params), argnums=1)
    def layer(x, params):
        for _ in range(10):
            x = apply(x, params)
        return x

    layer(x0, dict(net.named_parameters())).mean().backward()
    bias = torch.tensor([0.0574, 0.2114, 0.1403, 0.3046])
    row = torch.tensor([0.0272, 0.0031, -0.0156, -0.0238])
    torch.testing.assert_close(net.bias.grad, bias, rtol=0, atol=6e-5)
    torch.testing.assert_close(net.weight.grad[0], row, rtol=0, atol=6e-5)


def test_root_vjp_and_root_jvp():
    F = lambda x, a, n: {"y": x["y"] ** 2 - a}  # noqa: E731
    solution, args = {"y": tensor([2.0, 3.0])}, (tensor([4.0, 9.0]), 2)
    cotangent = {"y": tensor([1.0, 6.0])}
    found = root_vjp(F, solution, args, cotangent)
    torch.testing.assert_close(found[0], tensor([0.25, 1.0]))
    assert found[1] == 2
    pushed = root_jvp(F, solution, args, (tensor([4.0, 6.0]), 0))
    torch.testing.assert_close(pushed["y"], tensor([1.0, 1.0]))


# --- what surrounds the gradient ------------------------------------------------------------------


def test_start_and_other_arguments_have_no_gradient():
    start, a = tensor(2.0).requires_grad_(), tensor(4.0).requires_grad_()

    @custom_root(lambda x, a, scale: scale * (x**2 - a), argnums=1)
    def square_root(x, a, scale):
        return a.sqrt()

    scale = tensor(3.0).requires_grad_()
    square_root(start, a, scale).backward()
    assert start.grad is None
    assert scale.grad is None
    torch.testing.assert_close(a.grad, tensor(0.25))


def test_solver_may_use_autograd_on_its_start():
    @custom_root(lambda x, a: 2 * (x - a), argnums=1)
    def descend(x, a):
        with torch.enable_grad():
            for _ in range(60):
                (g,) = torch.autograd.grad(((x - a) ** 2).sum(), x)
                x = x - 0.3 * g
        return x

    a = tensor([1.0, 2.0]).requires_grad_()
    x = descend(torch.zeros(2, dtype=torch.float64, requires_grad=True), a)
    x.pow(2).sum().backward()
    torch.testing.assert_close(a.grad, 2 * a.detach())


class Product(torch.autograd.Function):
    """A x; counts products in the reverse direction."""

    count = 0

    @staticmethod
    def forward(A, x):
        return A @ x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, cotangent):
        Product.count += 1
        return None, ctx.saved_tensors[0].T @ cotangent


@pytest.mark.parametrize("k", [1, 3, 5])
def test_backward_takes_at_most_one_hessian_product_more_than_steps(k):
    A = X.T @ X
    solve = solve_cg(rtol=0.0, maxiter=k, on_fail="ignore")

    @custom_root(lambda x, a: Product.apply(A, x) - a, argnums=1, solve=solve, symmetric=True)
    def solver_fn(x, a):
        return torch.linalg.solve(A, a)

    a = torch.ones(5, dtype=torch.float64, requires_grad=True)
    x = solver_fn(torch.zeros(5, dtype=torch.float64), a)
    Product.count = 0
    x.sum().backward()
    assert Product.count == k + 1


def test_polish_squares_the_error():
    def rough(error, polish):
        @custom_root(lambda x, a: x**3 - a, argnums=1, polish=polish)
        def cube_root(start, a):
            return a ** (1 / 3) + error

        return abs(float(grad(cube_root, 1)(None, tensor(8.0))) - 1 / 12)

    for polish, order in ((0, 1), (1, 2), (2, 4)):
        # The next order is a part of about the error over the root, 2.
        ratio = rough(0.004, polish) / rough(0.002, polish)
        assert abs(torch.log2(tensor(ratio)) - order) < 0.01


def test_an_unsolved_problem_warns_raises_or_is_unrolled():
    def solver_fn(x, a):
        for _ in range(2):
            x = 0.5 * (x + a / x)
        return x

    a = tensor(4.0)

    def solved(on_fail):
        return custom_root(lambda x, a: x**2 - a, argnums=1, tol=1e-6, on_fail=on_fail)(solver_fn)

    with pytest.warns(OptimalityWarning, match="polish"):
        solved("warn")(tensor(1.0), a)
    with pytest.raises(OptimalityError, match="polish"):
        solved("raise")(tensor(1.0), a)
    with pytest.raises(OptimalityError):
        vmap(solved("raise"))(tensor([1.0, 2.0]), tensor([4.0, 4.0]))
    unrolled = grad(solved("unroll"), 1)(tensor(1.0), a)
    torch.testing.assert_close(unrolled, grad(solver_fn, 1)(tensor(1.0), a))


def test_unrolling_a_solver_without_a_graph_is_refused():
    @custom_root(lambda x, a: x**2 - a, argnums=1, tol=1e-6, on_fail="unroll")
    def solver_fn(x, a):
        with torch.no_grad():
            return 0.5 * (x + a / x)

    a = tensor(4.0)
    with pytest.raises(OptimalityError, match="unroll.*no_grad"):
        solver_fn(tensor(1.0), a.clone().requires_grad_())
    with pytest.raises(OptimalityError, match="unroll.*no_grad"):
        grad(solver_fn, 1)(tensor(1.0), a)
    torch.testing.assert_close(solver_fn(tensor(1.0), a), tensor(2.5))


def test_nan_of_the_solver_is_reported_without_a_tolerance():
    def solved(on_fail):
        return custom_root(lambda x, a: x**2 - a, argnums=1, on_fail=on_fail)(
            lambda x, a: (a - 5).sqrt()
        )

    with pytest.raises(OptimalityError, match="finite.*NaN.*smaller steps"):
        solved("raise")(tensor(1.0), tensor(4.0))
    assert solved("ignore")(tensor(1.0), tensor(4.0)).isnan()
    for on_fail in ("warn", "unroll"):
        with pytest.warns(OptimalityWarning, match="finite.*NaN.*smaller steps"):
            solved(on_fail)(tensor(1.0), tensor(4.0))
    with pytest.raises(OptimalityError, match="NaN"):
        vmap(solved("raise"))(tensor([1.0, 1.0]), tensor([4.0, 9.0]))


@pytest.mark.parametrize("wanted", [0, 1])
def test_optimality_that_ignores_an_argument(wanted):
    @custom_root(lambda x, a, b: x**2 - (a, b.detach())[0], argnums=(1, 2))
    def square_root(x, a, b):
        return a.sqrt()

    a, b = tensor(4.0).requires_grad_(wanted == 0), tensor(1.0).requires_grad_(wanted == 1)
    if wanted == 0:  # nobody asks for the gradient of b
        square_root(None, a, b).backward()
        torch.testing.assert_close(a.grad, tensor(0.25))
        return
    message = "does not depend on argument 2 of solver_fn.*argnums.*detach"
    with pytest.raises(NotDifferentiableError, match=message):
        square_root(None, a, b).backward()
    for transform in (grad, jacrev, jacfwd):
        with pytest.raises(NotDifferentiableError, match=message):
            transform(square_root, 2)(None, tensor(4.0), tensor(1.0))
    with pytest.raises(NotDifferentiableError, match=message):
        vmap(grad(square_root, 2), (None, 0, 0))(None, tensor([4.0, 1.0]), tensor([1.0, 1.0]))


def test_zero_gradient_of_an_argument_that_is_used_is_not_an_error():
    solve = custom_root(lambda x, a: x - a**2, argnums=1)(lambda x, a: a**2)
    assert grad(lambda a: 0 * solve(None, a))(tensor(3.0)) == 0
    assert grad(solve, 1)(None, tensor(0.0)) == 0
    assert jacfwd(solve, 1)(None, tensor(0.0)) == 0


def test_singular_system_is_reported_with_a_remedy():
    @custom_root(lambda x, a: torch.stack([x.sum() - a, 2 * (x.sum() - a)]), argnums=1)
    def solve(x, a):
        return torch.stack([a, torch.zeros_like(a)])

    with pytest.warns(LinearSolveWarning, match="SINGULAR.*ridge"):
        grad(lambda a: solve(None, a)[0])(tensor(1.0))
    strict = custom_root(lambda x, a: 0 * x + a, argnums=1, solve=LU())(lambda x, a: a)
    with pytest.raises(LinearSolveError, match="SINGULAR.*ridge"):
        grad(strict, 1)(None, tensor(0.0))


def test_complex_root():
    a = torch.tensor([1.0 + 2.0j, -3.0 + 0.5j], dtype=torch.complex128, requires_grad=True)
    for solve in (None, GMRES(1e-13), LSMR(1e-13)):

        @custom_root(lambda x, a: x**3 + x - a, argnums=1, solve=solve, polish=3)
        def root(x, a):
            x = torch.ones_like(a)
            for _ in range(30):
                x = x - (x**3 + x - a) / (3 * x**2 + 1)
            return x

        assert gradcheck(lambda a, root=root: root(None, a), (a,))
        slope = 1 / (3 * root(None, a).detach() ** 2 + 1)
        (found,) = torch.autograd.grad(root(None, a), a, torch.ones_like(a))
        torch.testing.assert_close(found, slope.conj())


def test_engine_is_a_value():
    engine = ImplicitEngine(lambda x, a: x**3 - a, (1,))
    assert engine == ImplicitEngine(engine.optimality_fn, (1,), solve=engine.solve)
    torch.testing.assert_close(
        grad(engine(lambda x, a: a ** (1 / 3)), 1)(None, tensor(8.0)), tensor(1 / 12)
    )


def test_failing_linear_solve_warns_or_raises():
    def solved(solve):
        return custom_root(lambda x, a: X.T @ X @ x - a, argnums=1, solve=solve)(
            lambda x, a: torch.linalg.solve(X.T @ X, a)
        )

    a = torch.ones(5, dtype=torch.float64)
    with pytest.warns(LinearSolveWarning, match="MAX_ITERATIONS"):
        jacrev(lambda a: solved(solve_cg(maxiter=1))(None, a).sum())(a)
    with pytest.raises(LinearSolveError, match="MAX_ITERATIONS"):
        jacrev(lambda a: solved(solve_cg(maxiter=1, on_fail="raise"))(None, a).sum())(a)


def test_invalid_use_is_refused_with_a_clear_message():
    F = lambda x, a: x - a  # noqa: E731
    a = tensor(1.0).requires_grad_()
    for argnums in (0, (0, 1), ()):
        with pytest.raises(AssertionError):
            custom_root(F, argnums=argnums)
    for argnums in (1.0, "1", (1, None)):
        with pytest.raises(TypeError, match="argnums: expected the position of an argument"):
            custom_root(F, argnums=argnums)
    assert custom_root(F, argnums=np.int64(1))(lambda x, a: a.clone())(None, a) == a
    with pytest.raises(ValueError, match="positional arguments"):
        custom_root(F, argnums=2)(lambda x, a: a)(None, a)
    with pytest.raises(RuntimeError, match=r"tuple: \(output, aux\) if has_aux is True. Got"):
        custom_root(F, argnums=1, has_aux=True)(lambda x, a: a)(None, a)
    with pytest.raises(RuntimeError, match="output of function solver_fn should be a torch.Tensor"):
        custom_root(F, argnums=1)(lambda x, a: 3.0)(None, a)
    with pytest.raises(RuntimeError, match="argument of function solver_fn specified with"):
        custom_root(F, argnums=1)(lambda x, a: tensor(1.0))(None, 2.0)
    with pytest.raises(TypeError, match="could not be resolved to positional arguments"):
        custom_root(F, argnums=1)(lambda x, a, *, k: a)(None, a, k=1)
    with pytest.raises(ValueError, match="polish"):
        custom_root(F, argnums=1, polish=-1)
    with pytest.raises(ValueError, match="on_fail"):
        custom_root(F, argnums=1, on_fail="never")
    with pytest.raises(ValueError, match="value of T must have the structure and shapes"):
        custom_fixed_point(lambda x, a: a.expand(2), argnums=1)(lambda x, a: a.clone())(
            None, a
        ).backward()
    with pytest.raises(ValueError, match="structure and shapes of the solution"):
        custom_root(lambda x, a: (x - a,), argnums=1)(lambda x, a: a.clone())(None, a).backward()
    with pytest.raises(ValueError, match="structure and shapes of the solution"):
        custom_root(lambda x, a: (x - a).expand(2), argnums=1)(lambda x, a: a.clone())(
            None, a
        ).backward()


def test_an_object_that_keeps_its_solution_is_released():
    class Layer:
        def __init__(self):
            self.rate = 2.0

        def solved(self, a):
            solve = custom_root(lambda x, a: (self.rate * x[0] - a, x[1] - x[0] * a), argnums=1)(
                lambda start, a: (a / self.rate, a * a / self.rate)
            )
            self.solution = solve(None, a)
            return self.solution

    refs = []
    for _ in range(3):
        layer = Layer()
        a = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        first, second = layer.solved(a)
        (g,) = torch.autograd.grad(first + second, a, create_graph=True)
        (h,) = torch.autograd.grad(g, a)
        torch.testing.assert_close((g.item(), h.item()), (3.5, 1.0))
        refs.append(weakref.ref(layer))
        del layer, first, second, g
    gc.collect()
    assert not any(ref() for ref in refs)


@pytest.mark.parametrize("vectorize", [False, True])
def test_higher_derivatives_of_solutions_that_nobody_keeps(vectorize):
    def loss(a):
        solve = custom_root(lambda x, a: (2.0 * x[0] - a, x[1] - x[0] * a**2), argnums=1)
        first, second = solve(lambda start, a: (a / 2.0, a**3 / 2.0))(None, a)
        gc.collect()
        return first + second

    a = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    second = torch.autograd.functional.hessian(loss, a, create_graph=True, vectorize=vectorize)
    (third,) = torch.autograd.grad(second, a)
    torch.testing.assert_close((second.item(), third.item()), (9.0, 3.0))


EMPTY = torch.empty(0, 3, dtype=torch.float64)


def distance(w, x):
    return ((w - x) ** 2).sum()


@custom_root(lambda x, a: 2 * x - a, argnums=1, solve=CG(), tol=1e-6)
def half(start, a):
    return a / 2


@zero_order(torch.randn, "antithetic", num_samples=3)
def sampled(x):
    return (x**2).sum()


OVER_NOTHING = {
    "a root": (root_of, True),
    "a root by CG": (lambda x: half(x, x), True),
    "an implicit loop": (lambda x: Implicit(distance, torchopt.sgd(0.5))(x * 0, x).params, True),
    "an inner loop": (
        lambda x: torchopt.inner_loop(distance, torchopt.adam(0.1), steps=2)(x * 0, x).params,
        False,
    ),
    "an estimate": (lambda x: sampled(x).expand(3), False),
}


@pytest.mark.parametrize("name", OVER_NOTHING)
def test_a_batch_without_entries_has_none_or_is_refused_by_solvers(name):
    function, refused = OVER_NOTHING[name]
    calls = (
        lambda: vmap(function)(EMPTY),
        lambda: vmap(grad(lambda x: function(x).sum()))(EMPTY),
        lambda: grad(lambda x: vmap(function)(x).sum())(EMPTY),
    )
    for call in calls:
        if refused:
            with pytest.raises(ValueError, match="batch of at least one entry"):
                call()
        else:
            assert call().shape == (0, 3)


@pytest.mark.parametrize("spelled", ["by name", "renamed", "in torch"])
def test_a_checkpoint_in_the_optimality_has_all_derivatives(spelled: str) -> None:
    """They are taken in transforms of torch.func, where torch refuses checkpoints."""
    again = checkpoint

    def cubic(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x**3 - t

    functions = {
        "by name": lambda x, t: checkpoint(cubic, x, t, use_reentrant=False),
        "renamed": lambda x, t: again(cubic, x, t, use_reentrant=False),
        "in torch": lambda x, t: torch.utils.checkpoint.checkpoint(
            lambda x, t: x**3 - t, x, t, use_reentrant=False
        ),
    }
    f = functions[spelled]
    solve = custom_root(f, argnums=1)(lambda x, theta: theta ** (1 / 3))
    x0 = torch.ones(2, dtype=torch.float64)
    theta = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(solve(x0, theta).sum(), theta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), theta)
    t = theta.detach()
    torch.testing.assert_close(first.detach(), t ** (-2 / 3) / 3)
    torch.testing.assert_close(second, -2 * t ** (-5 / 3) / 9)
    both = torch.func.vmap(torch.func.grad(lambda t: solve(x0, t).sum()))(torch.stack([t, 2 * t]))
    torch.testing.assert_close(both[1], (2 * t) ** (-2 / 3) / 3)
