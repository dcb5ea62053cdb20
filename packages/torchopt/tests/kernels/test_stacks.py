# SPDX-License-Identifier: Apache-2.0
"""Stacked matrices have the same values and derivatives as single ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchopt.kernels.reference.inverse_root import inverse_root, newton_inverse_root
from torchopt.kernels.stacks import in_stacks, stacks
from torchopt.transform import orthogonalize, scale_by_shampoo

DOUBLE = torch.float64
SHAPES = ((3, 5), (5, 3), (4, 4), (3, 5), (4, 4), (1, 6), (6, 1), (0, 3))


def matrices(*shapes: tuple[int, ...], dtype: torch.dtype = DOUBLE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator, dtype=DOUBLE).to(dtype) for s in shapes]


def kept_elements(function: object, inputs: list[Tensor]) -> int:
    """Return how many elements the graph of `function` saves besides the inputs."""
    known = {x.data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.data_ptr() not in known:
            kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(inputs)  # type: ignore[operator]
    assert all(x.requires_grad for x in out)
    return sum(kept.values())


def shampoo_directions(grads: list[Tensor]) -> list[Tensor]:
    direction = scale_by_shampoo(eps=0.1)
    return list(direction.update(grads, direction.init(grads), inplace=False)[0])


def orthogonal(grads: list[Tensor]) -> list[Tensor]:
    return list(orthogonalize(steps=3).update(grads, ())[0])


@pytest.mark.parametrize("function", [shampoo_directions, orthogonal])
def test_each_matrix_is_stepped_as_if_alone(function: object) -> None:
    grads = matrices(*SHAPES)
    together = function(grads)  # type: ignore[operator]
    for g, u in zip(grads, together):
        (alone,) = function([g])  # type: ignore[operator]
        torch.testing.assert_close(u, alone, rtol=1e-11, atol=1e-13)
        assert u.shape == g.shape
        assert not u._is_view()
    weights = matrices(*SHAPES)
    inputs = [g.clone().requires_grad_() for g in grads]
    out = function(inputs)  # type: ignore[operator]
    slopes = torch.autograd.grad(sum((u * w).sum() for u, w in zip(out, weights)), inputs)
    for g, w, slope in zip(grads, weights, slopes):
        one = g.clone().requires_grad_()
        (alone,) = torch.autograd.grad((function([one])[0] * w).sum(), one)  # type: ignore[operator]
        torch.testing.assert_close(slope, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("function", [shampoo_directions, orthogonal])
def test_directions_are_differentiable_twice(function: object) -> None:
    inputs = [g.requires_grad_() for g in matrices((2, 3), (2, 3), (3, 2))]
    assert torch.autograd.gradcheck(lambda *x: tuple(function(list(x))), inputs)  # type: ignore[operator]
    assert torch.autograd.gradgradcheck(lambda *x: tuple(function(list(x))), inputs)  # type: ignore[operator]


def test_the_iteration_keeps_its_inputs_only() -> None:
    inputs = [g.requires_grad_() for g in matrices((4, 6), (4, 6), (6, 4))]
    assert kept_elements(orthogonal, inputs) <= 1


def test_one_of_many_matrices_can_be_differentiated_alone() -> None:
    first, second, third = matrices((3, 4), (3, 4), (3, 4))
    second.requires_grad_()
    out = orthogonal([first, second, third])
    (got,) = torch.autograd.grad(out[1].sum(), second)
    one = second.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(orthogonal([one])[0].sum(), one)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-13)


def test_stacks_are_of_one_kind_and_bounded() -> None:
    tensors = [*matrices((2, 3), (2, 3)), *matrices((2, 3), dtype=torch.float32), *matrices((3, 2))]
    assert stacks(tensors) == [[0, 1], [2], [3]]
    assert stacks(tensors[:2], [True, False]) == [[0], [1]]
    large = [torch.empty(512, 512, dtype=DOUBLE)] * 3
    assert stacks(large) == [[0], [1], [2]]
    assert stacks([]) == []
    assert in_stacks(torch.exp, []) == []


def of_spectrum(values: list[float]) -> Tensor:
    basis = torch.linalg.qr(matrices((len(values), len(values)))[0])[0]
    return basis @ torch.diag(torch.tensor(values, dtype=DOUBLE)) @ basis.mT


@pytest.mark.parametrize("order", [1, 2, 4, 6])
@pytest.mark.parametrize(
    "values", [[1.0, 1.0, 1.0], [2.0, 2.0, 3.0], [1e-8, 1e-8, 1.0], [1e-3, 5.0, 1e3]]
)
def test_inverse_roots_have_derivatives_where_eigenvalues_coincide(
    values: list[float], order: int
) -> None:
    a = of_spectrum(values)
    root = inverse_root(a, order)
    wanted = of_spectrum([v ** (-1 / order) for v in values])
    size = float(wanted.abs().max())
    torch.testing.assert_close(root, wanted, rtol=1e-7, atol=1e-8 * size)
    cotangent = matrices((3, 3))[0]
    both = []
    for function in (inverse_root, newton_inverse_root):
        x = a.clone().requires_grad_()
        (slope,) = torch.autograd.grad((function(x, order) * cotangent).sum(), x)
        both.append((slope + slope.mT) / 2)
    torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=1e-7 * float(both[1].abs().max()))


def test_inverse_roots_of_matrices_that_are_not_positive_are_nan() -> None:
    good, wrong = of_spectrum([1.0, 2.0]), of_spectrum([1.0, -2.0])
    infinite = torch.full((2, 2), torch.inf, dtype=DOUBLE)
    roots = inverse_root(torch.stack([good, wrong, infinite]), 2)
    torch.testing.assert_close(roots[0] @ roots[0] @ good, torch.eye(2, dtype=DOUBLE))
    assert torch.isnan(roots[1:]).all()


def test_inverse_roots_under_transforms() -> None:
    batch = torch.stack([of_spectrum([1.0, 2.0, 2.0]), of_spectrum([0.5, 0.5, 4.0])])
    wanted = torch.stack([newton_inverse_root(a, 4) for a in batch])
    torch.testing.assert_close(torch.func.vmap(lambda a: inverse_root(a, 4))(batch), wanted)

    def total(a: Tensor) -> Tensor:
        return inverse_root(a, 4)[0].square().sum()

    slopes = torch.func.vmap(torch.func.grad(total))(batch)
    alone = torch.stack([torch.func.grad(total)(a) for a in batch])
    torch.testing.assert_close(slopes, alone)
    direction = matrices((3, 3))[0]
    direction = direction + direction.mT
    _, tangent = torch.func.jvp(total, (batch[0],), (direction,))
    torch.testing.assert_close(tangent, (alone[0] * direction).sum())


def iterated(g: Tensor, eps: float) -> Tensor:
    """Return five steps of Muon's iteration, as its author wrote them."""
    x = g.mT if g.shape[0] > g.shape[1] else g
    size = x.abs().max()
    size = size if 0 < size < torch.inf else torch.ones((), dtype=g.dtype)
    x = x / size
    x = x / (x.square().sum().sqrt().clamp(min=eps / float(size)))
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if g.shape[0] > g.shape[1] else x) * max(1.0, g.shape[0] / g.shape[1]) ** 0.5


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30, 0.0])
def test_one_call_iterates_matrices_of_all_shapes(dtype: torch.dtype, size: float) -> None:
    shapes = [(1, 1), (3, 5), (16, 16), (17, 33), (64, 20), (20, 64), (40, 40), (7, 300), (600, 4)]
    grads = [g * size for g in matrices(*shapes, dtype=dtype)]
    exact = 1e-12 if dtype == DOUBLE else 1e-5
    for watched in (False, True):
        given = [g.clone().requires_grad_(watched) for g in grads]
        for g, u in zip(grads, orthogonalize().update(given, (), inplace=False)[0]):
            torch.testing.assert_close(u.detach(), iterated(g, 1e-7), rtol=exact, atol=exact)


def test_non_finite_values_stay_visible() -> None:
    for wrong in (torch.nan, torch.inf):
        g = matrices((5, 9))[0]
        g[2, 3] = wrong
        (u,) = orthogonalize().update([g], ())[0]
        assert torch.isnan(u).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 50), (16, 64), (100, 7), (20, 41), (1, 2)])
@pytest.mark.parametrize("steps", range(1, 8))
def test_wide_matrices_iterate_their_squares_to_the_same_values(
    steps: int, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Also if singular values are smaller than the rounding error of their squares."""
    generator = torch.Generator().manual_seed(steps)
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(full, full_matrices=False)
    graded = u * torch.logspace(0, -5, min(shape), dtype=torch.float64) @ v
    rule = orthogonalize(steps)
    for matrix in (full, graded):
        g = matrix.to(dtype)
        exact = g.double().requires_grad_()  # tensors with a graph are iterated in torch
        (got,), _ = rule.update([g], rule.init([g]))
        (wanted,), _ = rule.update([exact], rule.init([exact]))
        error = torch.linalg.matrix_norm(got.double() - wanted.detach(), 2)
        # An error of the start grows as small singular values do, by 3.4445 in a step.
        bound = 10 * 3.4445**steps * torch.finfo(dtype).eps
        assert error <= bound * torch.linalg.matrix_norm(wanted.detach(), 2)
