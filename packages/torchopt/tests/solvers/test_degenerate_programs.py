# SPDX-License-Identifier: Apache-2.0
"""Quadratic programs with redundant, dependent or contradictory rows."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.func import jacfwd, jacrev, vmap

from torchopt.linear_solve import LinearSolveWarning
from torchopt.solvers import SolverError, SolverWarning, quadratic_program

F64 = torch.float64


def tensor(x):
    return torch.tensor(x, dtype=F64)


EYE, C = torch.eye(3, dtype=F64), -tensor([1.0, 2.0, 3.0])
BOX = {"G": torch.cat([EYE, -EYE]), "h": torch.full((6,), 10.0, dtype=F64)}
ROW = tensor([[1.0, 1.0, 0.0]])
ZERO = torch.zeros(1, 3, dtype=F64)


def with_rows(G, h, **more):
    return {"G": torch.cat([BOX["G"], G]), "h": torch.cat([BOX["h"], tensor(h)]), **more}


# The same program, min |x - (1, 2, 3)|² / 2 with x0 + x1 = 2, in several formulations.
SAME = {
    "plain": {"A": ROW, "b": tensor([2.0])},
    "twice": {"A": torch.cat([ROW, 2 * ROW]), "b": tensor([2.0, 4.0]), **BOX},
    "negated": {"A": torch.cat([ROW, -ROW]), "b": tensor([2.0, -2.0])},
    "zero_equation": {"A": torch.cat([ROW, ZERO]), "b": tensor([2.0, 0.0])},
    "zero_inequality": with_rows(ZERO, [0.0], A=ROW, b=tensor([2.0])),
    "zero_inequality_with_room": with_rows(ZERO, [1.0], A=ROW, b=tensor([2.0])),
    "infinite_bound": with_rows(EYE[:1], [torch.inf], A=ROW, b=tensor([2.0])),
    "huge_bound": with_rows(EYE[:1], [1e12], A=ROW, b=tensor([2.0])),
    "as_inequality_too": with_rows(torch.cat([ROW, -ROW]), [2.0, -2.0], A=ROW, b=tensor([2.0])),
    "two_inequalities": with_rows(torch.cat([ROW, ROW]), [2.0, 2.0]),
    "small_row": {"A": torch.cat([ROW, 1e-6 * ROW]), "b": tensor([2.0, 2e-6])},
}


@pytest.mark.parametrize("name", sorted(SAME))
def test_redundant_rows_change_neither_solution_nor_slope(name):
    kind = SAME[name]
    x = quadratic_program(EYE, C, **kind, on_fail="raise").x
    torch.testing.assert_close(x, tensor([0.5, 1.5, 3.0]))
    # The projection onto the plane.
    expected = -(EYE - ROW.T @ ROW / 2)
    for transform in (jacrev, jacfwd):
        slope = transform(lambda c: quadratic_program(EYE, c, **kind).x)(C)
        torch.testing.assert_close(slope, expected)
    batch = torch.stack([C, 2 * C])
    many = vmap(lambda c: quadratic_program(EYE, c, **kind).x)(batch)
    torch.testing.assert_close(many[0], x)
    small = {name: x.float() for name, x in kind.items()}
    x32 = quadratic_program(EYE.float(), C.float(), **small, on_fail="raise").x
    torch.testing.assert_close(x32.double(), x, rtol=1e-6, atol=1e-6)


def test_infinite_and_idle_rows_have_no_gradient():
    for name in ("infinite_bound", "huge_bound"):
        kind = SAME[name]

        def total(G, h, kind=kind):
            return quadratic_program(EYE, C, kind["A"], kind["b"], G, h).x.pow(2).sum()

        gradients = torch.func.grad(total, (0, 1))(kind["G"], kind["h"])
        assert not any(x.any() for x in gradients)


def test_multipliers_of_dependent_rows_have_the_least_norm():
    _, nu, _ = quadratic_program(EYE, C, torch.cat([ROW, 2 * ROW]), tensor([2.0, 4.0]))
    torch.testing.assert_close(nu, tensor([0.1, 0.2]))
    _, _, lam = quadratic_program(EYE, C, **SAME["two_inequalities"])
    torch.testing.assert_close(lam[-2:], tensor([0.25, 0.25]))


def test_derivatives_along_changes_that_keep_the_rank():
    """Multipliers too, to second order: the pseudo-inverse in closed form."""

    def arguments(t):
        factors = torch.stack([1 + t, 1 - t])
        A = factors[:, None] * torch.cat([ROW + t * EYE[2:], 2 * (ROW + t * EYE[2:])])
        return EYE * (1 + t), C * (1 + t**2), A, factors * tensor([2.0, 4.0])

    def ours(t):
        return torch.cat(tuple(quadratic_program(*arguments(t), **BOX))[:2])

    def closed(t):
        _, c, A, b = arguments(t)
        a, r = A[0], b[0]
        y = -(a @ c + r * (1 + t)) / (a @ a)
        x = -(c + a * y) / (1 + t)
        ratio = torch.stack([1 + 0 * t, 2 * (1 - t) / (1 + t)])
        return torch.cat([x, y * ratio / (ratio @ ratio)])

    t = tensor(0.3)
    torch.testing.assert_close(ours(t), closed(t))
    torch.testing.assert_close(jacrev(ours)(t), jacrev(closed)(t))
    torch.testing.assert_close(jacfwd(jacrev(ours))(t), jacfwd(jacrev(closed))(t))


ONE, TWO = tensor([[1.0]]), torch.eye(2, dtype=F64)
NAN = tensor([torch.nan])
FAILURES = {
    "equations_contradict": ("INFEASIBLE", (ONE, ONE[0], ONE.expand(2, 1), tensor([1.0, 2.0]))),
    "zero_equation": ("INFEASIBLE", (ONE, ONE[0], 0 * ONE, ONE[0])),
    "bounds_contradict": (
        "INFEASIBLE",
        (ONE, ONE[0], None, None, torch.cat([ONE, -ONE]), tensor([-1.0, -1.0])),
    ),
    "zero_inequality": ("INFEASIBLE", (ONE, ONE[0], None, None, 0 * ONE, -ONE[0])),
    "bound_of_minus_infinity": (
        "INFEASIBLE",
        (ONE, ONE[0], None, None, ONE, tensor([-torch.inf])),
    ),
    "equation_against_bound": ("INFEASIBLE", (ONE, ONE[0], ONE, tensor([2.0]), ONE, ONE[0])),
    "linear_without_bound": ("INFEASIBLE", (0 * ONE, ONE[0])),
    "flat_direction": ("INFEASIBLE", (ONE.expand(2, 2), tensor([1.0, -1.0]))),
    "maximum": ("INFEASIBLE", (-TWO, tensor([1.0, 1.0]))),
    "saddle_in_a_box": (
        "INFEASIBLE",
        (
            torch.diag(tensor([1.0, -1.0])),
            tensor([0.0, 0.0]),
            None,
            None,
            torch.cat([TWO, -TWO]),
            torch.ones(4, dtype=F64),
        ),
    ),
    "nan_in_Q": ("NON_FINITE", (NAN[None], ONE[0])),
    "nan_in_c": ("NON_FINITE", (ONE, NAN)),
    "nan_in_A": ("NON_FINITE", (ONE, ONE[0], NAN[None], ONE[0])),
    "nan_in_b": ("NON_FINITE", (ONE, ONE[0], ONE, NAN)),
    "nan_in_G": ("NON_FINITE", (ONE, ONE[0], None, None, NAN[None], ONE[0])),
    "nan_in_h": ("NON_FINITE", (ONE, ONE[0], None, None, ONE, NAN)),
    "infinite_Q": ("NON_FINITE", (ONE / 0, ONE[0])),
    "infinite_b": ("NON_FINITE", (ONE, ONE[0], ONE, ONE[0] / 0)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", sorted(FAILURES))
def test_programs_without_a_solution_are_reported_and_give_nan(name, dtype):
    status, given = FAILURES[name]
    padded = (*given, *[None] * (6 - len(given)))
    program = [None if x is None else x.to(dtype) for x in padded]
    with pytest.raises(SolverError, match=status):
        quadratic_program(*program, on_fail="raise")
    assert quadratic_program(*program, on_fail="ignore").x.isnan().all()
    # Beside a sound program in a batch, only the failing one is NaN.
    sound = [None if x is None else torch.zeros_like(x) for x in program]
    sound[0] = torch.eye(len(program[1]), dtype=dtype)
    if program[5] is not None:
        sound[5] = torch.ones_like(program[5])
    both = [None if x is None else torch.stack([x, y]) for x, y in zip(program, sound)]
    with pytest.warns(SolverWarning, match=status):
        x = quadratic_program(*both).x
    assert x[0].isnan().all()
    assert not x[1].any()


def test_too_few_steps_are_reported():
    g = torch.Generator().manual_seed(0)
    G, c = (torch.randn(*s, generator=g, dtype=F64) for s in ((60, 20), (20,)))
    with pytest.raises(SolverError, match="MAX_ITERATIONS"):
        quadratic_program(
            torch.eye(20, dtype=F64), c, G=G, h=0.1 + 0 * G[:, 0], maxiter=1, on_fail="raise"
        )


def test_minimum_on_an_indefinite_form_that_is_convex_where_the_equations_hold():
    Q = torch.diag(tensor([1.0, -1.0]))
    x = quadratic_program(Q, tensor([-1.0, 0.0]), TWO[1:], tensor([0.5]), on_fail="raise").x
    torch.testing.assert_close(x, tensor([1.0, 0.5]))


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("price", [1e-8, 1.0, 1e8])
def test_units_make_no_difference(unit, price):
    kind = SAME["as_inequality_too"]
    x = quadratic_program(
        EYE * price,
        C * price * unit,
        kind["A"],
        kind["b"] * unit,
        kind["G"],
        kind["h"] * unit,
        on_fail="raise",
    ).x
    torch.testing.assert_close(x / unit, tensor([0.5, 1.5, 3.0]))


def test_float32_programs_are_solved_to_float32_accuracy():
    g = torch.Generator().manual_seed(0)
    root, c, G, h = (torch.randn(50, *k, generator=g) for k in ((5, 5), (5,), (7, 5), (7,)))
    program = {"Q": root @ root.mT + torch.eye(5), "c": c, "G": G, "h": h.abs()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = quadratic_program(**program).x
        exact = quadratic_program(**{k: v.double() for k, v in program.items()}).x
    torch.testing.assert_close(x.double(), exact, rtol=1e-6, atol=1e-6)


def random_program(seed):
    """Return a small program with integer numbers: often degenerate, singular or contradictory."""
    g = torch.Generator().manual_seed(seed)

    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=g).to(F64)

    n, p, m, rank = (int(torch.randint(0, k, (), generator=g)) for k in (3, 2, 5, 4))
    n += 1
    root, A, G, inside = integers(n, rank), integers(p, n), integers(m, n), integers(n)
    h = G @ inside + torch.randint(-1, 3, (m,), generator=g).clamp(min=0 if seed % 3 else -1)
    if m > 1 and seed % 2:
        G[1], h[1] = G[0], h[0]
    return root @ root.T, integers(n), A, A @ inside, G, h


def least_value(Q, c, A, b, G, h):
    """Return the least ½ xᵀQx + cᵀx over the stationary points of all sets of active rows."""
    best = torch.inf
    n = len(c)
    for size in range(len(h) + 1):
        for chosen in itertools.combinations(range(len(h)), size):
            rows, right = torch.cat([A, G[list(chosen)]]), torch.cat([b, h[list(chosen)]])
            corner = torch.zeros(len(right), len(right), dtype=F64)
            K = torch.cat([torch.cat([Q, rows.T], 1), torch.cat([rows, corner], 1)])
            r = torch.cat([-c, right])
            y = torch.linalg.pinv(K, rtol=1e-10) @ r
            x = y[:n]
            feasible = (G @ x <= h + 1e-8).all() and ((A @ x - b).abs() < 1e-8).all()
            if (K @ y - r).abs().max() < 1e-8 and feasible and (y[n + len(b) :] > -1e-8).all():
                best = min(best, float(x @ Q @ x / 2 + c @ x))
    return best


def test_random_degenerate_programs_against_the_enumeration_of_active_rows():
    counts = {True: 0, False: 0}
    for seed in range(40):
        program = random_program(seed)
        Q, c, A, b, G, h = program
        x = quadratic_program(*program, on_fail="ignore").x
        expected = least_value(*program)
        solved = expected < torch.inf
        if solved:
            assert abs(float(x @ Q @ x / 2 + c @ x) - expected) < 1e-7, seed
            assert (G @ x <= h + 1e-7).all()
            assert torch.allclose(A @ x, b, atol=1e-7)
        else:
            # The enumeration finds only the minimum of least norm; a face may miss it.
            assert x.isnan().all() or torch.linalg.matrix_rank(Q) != len(c), seed
        counts[solved] += 1
    assert min(counts.values()) > 5


def test_kinks_and_minima_that_are_not_unique_are_reported_when_they_are_differentiated():
    with pytest.warns(LinearSolveWarning, match="SINGULAR"):
        jacrev(lambda h: quadratic_program(ONE, -ONE[0], G=ONE, h=h).x)(ONE[0])
    box = {"G": torch.cat([TWO, -TWO]), "h": torch.ones(4, dtype=F64)}
    flat = torch.diag(tensor([1.0, 0.0]))
    quadratic_program(flat, tensor([0.5, 0.0]), **box, on_fail="raise")
    with pytest.warns(LinearSolveWarning, match="SINGULAR"):
        jacrev(lambda c: quadratic_program(flat, c, **box).x)(tensor([0.5, 0.0]))


def test_no_unknowns():
    empty = torch.zeros(0, 0), torch.zeros(0)
    assert quadratic_program(*empty, on_fail="raise").x.shape == (0,)
    rows = {"G": torch.zeros(1, 0), "h": -torch.ones(1)}
    with pytest.raises(SolverError, match="INFEASIBLE"):
        quadratic_program(*empty, **rows, on_fail="raise")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_applies_only_to_the_arguments(dtype):
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        root, c, A, G, x = (
            torch.randn(*shape, generator=g, dtype=F64)
            for shape in ((4, 4), (4,), (1, 4), (5, 4), (4,))
        )
        Q, h = root @ root.T + torch.eye(4, dtype=F64), G @ x + 0.1
        narrow = [v.to(dtype).requires_grad_() for v in (Q, 2 * c, A, A @ x, G, h)]
        exact = [v.detach().double().requires_grad_() for v in narrow]
        found, expected = (quadratic_program(*v, on_fail="raise") for v in (narrow, exact))
        eps = torch.finfo(dtype).eps
        for mine, theirs in zip(found, expected):
            assert mine.dtype is dtype
            torch.testing.assert_close(mine.double(), theirs, rtol=eps, atol=eps)
        slopes = torch.autograd.grad(found.x.float().square().sum(), narrow)
        wanted = torch.autograd.grad(expected.x.square().sum(), exact)
        for mine, theirs in zip(slopes, wanted):
            atol = 20 * eps * max(1.0, float(theirs.abs().max()))
            torch.testing.assert_close(mine.double(), theirs, rtol=20 * eps, atol=atol)


def test_programs_without_a_solution_have_no_derivative():
    G, h = torch.cat([EYE[:1], -EYE[:1]]), tensor([-1.0, -1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinearSolveWarning)
        for transform in (jacrev, jacfwd):
            slope = transform(lambda c: quadratic_program(EYE, c, G=G, h=h, on_fail="ignore").x)(C)
            assert slope.isnan().all()


def test_empty_batches_integers_and_other_dtypes():
    empty = torch.zeros(0, 3, dtype=F64, requires_grad=True)
    found = quadratic_program(EYE, empty, A=ROW, b=tensor([2.0]))
    assert [v.shape for v in found] == [(0, 3), (0, 1), (0, 0)]
    assert torch.autograd.grad(found.x.sum(), empty)[0].shape == (0, 3)
    expected = quadratic_program(EYE, C, ROW, tensor([2.0]))
    for A, b in ((ROW.long(), torch.tensor([2])), (ROW.float(), torch.tensor([2.0]))):
        torch.testing.assert_close(quadratic_program(EYE, C, A, b), expected)
    with pytest.raises(ValueError, match="A, b: expected real numbers"):
        quadratic_program(EYE, C, ROW + 0j, tensor([2.0]))
    with pytest.raises(ValueError, match=r"A, b: expected \[\*batch, k, 3\]"):
        quadratic_program(EYE, C, ROW, tensor(2.0))
    with pytest.raises(ValueError, match="on_fail: expected"):
        quadratic_program(EYE, C, on_fail="loud")


@pytest.mark.parametrize("unit", [1e-7, 1e-3, 1e5, 1e7])
def test_units_of_single_unknowns_make_no_difference(unit):
    each = tensor([1.0, unit, 1.0])
    Q, G, h = EYE + 0.5, torch.cat([torch.ones(1, 3, dtype=F64), EYE[1:2]]), tensor([1.0, 0.2])
    expected = quadratic_program(Q, C, G=G, h=h, on_fail="raise")
    slope = jacrev(lambda h: quadratic_program(Q, C, G=G, h=h).x)(h)
    given = (each[:, None] * Q * each, each * C)

    def found(h):
        return quadratic_program(*given, G=G * each, h=h, on_fail="raise")

    torch.testing.assert_close(found(h).x * each, expected.x)
    torch.testing.assert_close(found(h).lam, expected.lam)
    torch.testing.assert_close(jacrev(lambda h: found(h).x * each)(h), slope)
