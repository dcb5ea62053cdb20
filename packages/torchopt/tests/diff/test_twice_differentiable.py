# SPDX-License-Identifier: Apache-2.0
"""torch kernels with a wrong or no second derivative: every engine is correct.

The oracle is the same loss on a module that computes g v / ‖v‖ explicitly.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import Cube
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import weight_norm

import torchopt
from torchopt.diff import Implicit
from torchopt.diff.implicit import ImplicitMetaGradientModule, custom_root
from torchopt.diff.twice_differentiable import TwiceDifferentiable, _with_zeros
from torchopt.errors import NotDifferentiableError, SecondDerivativeWarning
from torchopt.linear_solve import CG
from torchopt.params import functional_call
from torchopt.solvers import LBFGS, LevenbergMarquardt, Newton, NewtonCG, SolveStatus
from torchopt.torch_internals import forward_mode, has_tangent

Params = dict[str, Tensor]
generator = torch.Generator().manual_seed(0)
X, Y = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (3, 2))


def start(dim: int = 0) -> nn.Module:
    torch.manual_seed(1)
    first = weight_norm(nn.Linear(3, 4, dtype=torch.float64), dim=dim)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 2, dtype=torch.float64))


def values(net: nn.Module) -> Params:
    return {k: p.detach().clone() for k, p in net.named_parameters()}


def of_module(net: nn.Module) -> Callable[[Params], Tensor]:
    return lambda p: functional_call(net, p, (X,))


def written_out(dim: int = 0) -> Callable[[Params], Tensor]:
    def forward(p: Params) -> Tensor:
        g, v = (p[f"0.parametrizations.weight.original{i}"] for i in (0, 1))
        hidden = torch.tanh(
            X @ (g * v / v.square().sum(1 - dim, keepdim=True).sqrt()).T + p["0.bias"]
        )
        return hidden @ p["2.weight"].T + p["2.bias"]

    return forward


def inner_loss(forward: Callable[[Params], Tensor], origin: Params) -> Any:
    def loss(p: Params, scale: Tensor) -> Tensor:
        pull = sum((p[k] - origin[k]).square().sum() for k in p)
        return scale * (forward(p) - Y).square().mean() + 0.3 * pull

    return loss


def total(p: Any) -> Tensor:
    return sum((x**3).sum() for x in p)  # type: ignore[return-value]


def explicit(**settings: Any) -> Any:
    def gradient(forward: Any, params: Params, scale: Tensor) -> Tensor:
        loss = inner_loss(forward, params)
        inner = torchopt.inner_loop(
            lambda p, _, scale: loss(p, scale), torchopt.sgd(0.2, momentum=0.9), steps=3, **settings
        )
        return torch.autograd.grad(total(inner(params, X, scale).params.values()), scale)[0]

    return gradient


def implicit(forward: Any, params: Params, scale: Tensor) -> Tensor:
    loss = inner_loss(forward, params)
    inner = Implicit(
        lambda p, _, scale: loss(p, scale),
        torchopt.sgd(0.3),
        steps=60,
        solve=CG(rtol=1e-13),
        positive_definite=True,
    )
    return torch.autograd.grad(total(inner(params, X, scale).params.values()), scale)[0]


def by_module(forward: Any, params: Params, scale: Tensor) -> Tensor:
    class Inner(ImplicitMetaGradientModule):
        def __init__(self, scale: Tensor) -> None:
            super().__init__()
            self.scale = scale
            self.own = nn.ParameterList(p.clone() for p in params.values())

        def objective(self) -> Tensor:
            return inner_loss(forward, params)(dict(zip(params, self.own)), self.scale)

        def solve(self) -> Inner:
            own = dict(zip(params, (p.detach() for p in self.own)))
            loss = inner_loss(written_out(), params)
            found = NewtonCG(tol=1e-12).run(loss, own, scale.detach()).value
            with torch.no_grad():
                for p, x in zip(self.own, found.values()):
                    p.copy_(x)
            return self

    return torch.autograd.grad(total(Inner(scale).solve().own), scale)[0]


def by_func_optimizer(forward: Any, params: Params, scale: Tensor) -> Tensor:
    loss, names = inner_loss(forward, params), list(params)
    optimizer = torchopt.FuncOptimizer(torchopt.sgd(0.2, momentum=0.9))
    stepped = tuple(p.clone().requires_grad_() for p in params.values())
    for _ in range(3):
        stepped = optimizer.step(loss(dict(zip(names, stepped)), scale), stepped)
    return torch.autograd.grad(total(stepped), scale)[0]


def by_solver(forward: Any, params: Params, scale: Tensor) -> Tensor:
    solution = NewtonCG(tol=1e-12)(inner_loss(forward, params), params, scale)
    return torch.autograd.grad(total(solution.values()), scale)[0]


def by_root_solver(forward: Any, params: Params, scale: Tensor) -> Tensor:
    optimality = torch.func.grad(inner_loss(forward, params))
    near = NewtonCG(tol=1e-6).run(inner_loss(written_out(), params), params, scale.detach()).value
    solution = Newton(tol=1e-10)(optimality, near, scale)
    return torch.autograd.grad(total(solution.values()), scale)[0]


def by_root(forward: Any, params: Params, scale: Tensor) -> Tensor:
    found = NewtonCG(tol=1e-12).run(inner_loss(written_out(), params), params, scale.detach()).value
    optimality = torch.func.grad(inner_loss(forward, params))
    solution = custom_root(optimality, argnums=1)(lambda _, scale: found)(None, scale)
    return torch.autograd.grad(total(solution.values()), scale)[0]


def compiled(forward: Any, params: Params, scale: Tensor) -> Tensor:
    loss = inner_loss(forward, params)

    def penalty(p: Params, scale: Tensor) -> Tensor:
        p = {k: x.requires_grad_() for k, x in p.items()}
        return total(torch.autograd.grad(loss(p, scale), list(p.values()), create_graph=True))

    traced = torchopt.second_order.compile(penalty, execute="trace")
    own = {k: x.clone().requires_grad_() for k, x in params.items()}
    found = torch.autograd.grad(traced(own, scale), [*own.values()])
    return total(found)


WAYS = {
    **{mode: explicit(derivative=mode) for mode in ("reverse", "mixed", "forward")},
    "steps computed again": explicit(keep="steps"),
    "traced": explicit(execute="trace"),
    "implicit": implicit,
    "FuncOptimizer": by_func_optimizer,
    "a minimizer": by_solver,
    "a root": by_root_solver,
    "custom_root": by_root,
    "ImplicitMetaGradientModule": by_module,
    "compiled": compiled,
}


@pytest.mark.parametrize("way", WAYS)
def test_weight_norm_has_its_second_derivative(way: str) -> None:
    net = start()
    params, scale = values(net), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected = WAYS[way](written_out(), params, scale)
    got = WAYS[way](of_module(net), params, scale)
    assert (got - expected).abs() <= 1e-7 * expected.abs()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("order", [1, 2])
def test_weight_norm_has_it_in_a_module_that_is_stepped(dim: int, order: int) -> None:
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def derivatives(first: Tensor) -> Tensor:
        found = torch.autograd.grad(first, scale, create_graph=True)[0]
        return found if order == 1 else torch.autograd.grad(found, scale)[0]

    net = start(dim)
    loss = inner_loss(written_out(dim), values(net))
    inner = torchopt.inner_loop(
        lambda p, _, scale: loss(p, scale), torchopt.sgd(0.2, momentum=0.9), steps=3
    )
    expected = derivatives(total(inner(values(net), X, scale).params.values()))
    optimizer = torchopt.MetaSGD(net, lr=0.2, momentum=0.9)
    loss = inner_loss(lambda _: net(X), values(net))
    for _ in range(3):
        optimizer.step(loss(dict(net.named_parameters()), scale))
    got = derivatives(total(net.parameters()))
    assert (got - expected).abs() <= 1e-12 * expected.abs()


def test_cross_entropy_in_chunks_is_refused_or_exchanged() -> None:
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is None:
        pytest.skip("this torch has no linear_cross_entropy")
    target = torch.tensor([0, 2, 1, 1, 0, 3])
    net = nn.Linear(3, 4, bias=False, dtype=torch.float64)

    def loss(weight: Tensor, x: Tensor, *chunked: Any) -> Tensor:
        settings = {"options": options(batch_chunk_size=2)} if chunked else {}
        return nn.functional.linear_cross_entropy(x, weight, target, **settings)

    with pytest.raises(NotDifferentiableError, match="linear_cross_entropy.*pass options=None"):
        torchopt.MetaSGD(net, lr=0.1).step(loss(net.weight, X, True))
    x, found = X.clone().requires_grad_(), []
    for chunked in ((), (True,)):
        inner = torchopt.inner_loop(
            lambda w, x, c=chunked: loss(w, x, *c), torchopt.sgd(0.5), steps=2
        )
        stepped = inner(net.weight.detach(), x).params
        found.append(torch.autograd.grad(stepped.pow(3).sum(), x)[0])
    assert (found[0] - found[1]).abs().max() <= 1e-12 * found[0].abs().max()


def test_least_squares_takes_kernels_without_a_forward_mode() -> None:
    net = start()
    params, forward = values(net), of_module(net)
    target = forward({k: p + 0.05 for k, p in params.items()})
    solved = LevenbergMarquardt(tol=1e-10).run(lambda p: forward(p) - target, params)
    assert solved.status == SolveStatus.CONVERGED
    assert (forward(solved.value) - target).abs().max() < 1e-8


def tasks(forward: Any, params: Params, scale: Tensor) -> Tensor:
    loss = inner_loss(forward, params)
    inner = torchopt.inner_loop(
        lambda p, _, scale: loss(p, scale), torchopt.sgd(0.2), steps=2, tasks=(None, 0, None)
    )
    return torch.autograd.grad(total(inner(params, X, scale).params.values()), scale)[0]


def cubed(p: Params) -> Tensor:
    return written_out()({k: x + 0.1 * Cube.apply(x) for k, x in p.items()})


REFUSING = [way for way in WAYS if way not in ("FuncOptimizer", "mixed", "forward")]


@pytest.mark.parametrize("way", [*REFUSING, "tasks"])
def test_once_differentiable_functions_are_refused(way: str) -> None:
    """torch's second derivative silently lacks a term."""
    run = tasks if way == "tasks" else WAYS[way]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    with pytest.raises(NotDifferentiableError, match="once_differentiable.*is zero in torch"):
        run(cubed, values(start()), scale)


def test_once_differentiable_functions_may_be_constant_or_differentiated_once() -> None:
    """A function of data needs no second derivative, and neither do differences."""
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    params = values(start())
    constant = inner_loss(lambda p: written_out()(p) + Cube.apply(Y), params)
    inner = torchopt.inner_loop(lambda p, _, s: constant(p, s), torchopt.sgd(0.2), steps=2)
    assert torch.autograd.grad(total(inner(params, X, scale).params.values()), scale)[0] != 0

    def gradient(cube: Any) -> Tensor:
        loss = inner_loss(
            lambda p: written_out()({k: x + 0.1 * cube(x) for k, x in p.items()}), params
        )
        inner = Implicit(
            lambda p, _, s: loss(p, s), torchopt.sgd(0.3), steps=80, derivative="differences"
        )
        return torch.autograd.grad(total(inner(params, X, scale).params.values()), scale)[0]

    expected = gradient(lambda x: x**3)
    assert (gradient(Cube.apply) - expected).abs() <= 1e-9 * expected.abs()


@pytest.mark.parametrize("kind", ["FuncOptimizer", "MetaSGD"])
def test_a_step_warns_about_once_differentiable_functions(kind: str) -> None:
    net = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    loss = Cube.apply(net.weight).sum()
    step: Any = torchopt.MetaSGD(net, lr=0.1).step
    if kind == "FuncOptimizer":
        step = functools.partial(torchopt.FuncOptimizer(torchopt.sgd(0.1)).step, params=net.weight)
    with pytest.warns(SecondDerivativeWarning, match="without a second derivative"):
        step(loss)


@pytest.mark.parametrize("derivative", ["mixed", "forward"])
def test_a_product_of_scattered_numbers_is_refused_in_forward_mode(derivative: str) -> None:
    """torch has no correct tangent of its gradient."""
    index = torch.tensor([0, 1, 0])

    def gradient(reduce: str, mode: str) -> Tensor:
        inner = torchopt.inner_loop(
            lambda w, _, s: s * w.new_ones(2).scatter_reduce(0, index, w, reduce).pow(3).sum(),
            torchopt.sgd(0.01),
            steps=2,
            derivative=mode,
        )
        scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(total([inner(X[0], None, scale).params]), scale)[0]

    expected = gradient("sum", "reverse")
    assert (gradient("sum", derivative) - expected).abs() <= 1e-12 * expected.abs()
    with pytest.raises(NotDifferentiableError, match='reduce="prod"'):
        gradient("prod", derivative)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_an_implicit_gradient_names_the_operation_without_a_second_derivative(mode: str) -> None:
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)

    def objective(x: Tensor, scale: Tensor) -> Tensor:
        return scale * torch.cdist(x, points).mean() + (x - X[:, :2]).square().sum()

    def solution(scale: Tensor) -> Tensor:
        found = LBFGS(tol=1e-9)(objective, X[:, :2], scale)
        return found.sum()

    scale = torch.tensor(0.7, dtype=torch.float64)
    transform = torch.func.jacrev if mode == "reverse" else torch.func.jacfwd
    with pytest.raises(NotDifferentiableError, match="LBFGS.*cdist.*write the distances out"):
        transform(solution)(scale)


def test_both_terms_of_a_sum_have_tangents_if_one_has() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y, t = (torch.randn(3, 2, dtype=torch.float64, generator=generator) for _ in range(3))
    with forward_mode():
        dual = forward_ad.make_dual(x, t)
        for terms, expected in (((dual, y), t), ((y, dual), -t)):
            filled = _with_zeros(terms)
            assert all(map(has_tangent, filled))
            with TwiceDifferentiable():
                found = terms[0] - terms[1]
            assert torch.equal(forward_ad.unpack_dual(found).tangent, expected)
        for other in ((x, y), (dual, dual), (dual, y[:1].expand(3, 2)), (dual, 1.5)):
            assert _with_zeros(other) is other


def test_no_function_in_python_is_asked_for_the_shapes_of_tangents() -> None:
    seen: list[str] = []

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith("_refs/__init__.py"):
            seen.append(frame.f_code.co_name)

    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()

    def loss(params: Params, x: Tensor) -> Tensor:
        out: Tensor = functional_call(net, params, x) - Y
        return (out**2).mean()

    params = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    inner = torchopt.inner_loop(loss, torchopt.sgd(0.1), steps=2, derivative="mixed")
    total = torch.stack([p.square().sum() for p in inner(params, X).params.values()]).sum()
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        total.backward()
    finally:
        sys.setprofile(before)
    assert not seen
