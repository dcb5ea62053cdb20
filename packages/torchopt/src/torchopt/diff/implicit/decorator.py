# SPDX-License-Identifier: Apache-2.0
"""custom_root and custom_fixed_point: implicit differentiation as decorators."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from torchopt.diff.implicit.certificate import GradientReport
from torchopt.diff.implicit.equation import displacement
from torchopt.diff.implicit.root import ImplicitEngine
from torchopt.diff.implicit.rule import ravel_all
from torchopt.linear_solve.auto import Auto
from torchopt.tree import is_smooth, tree_flatten, tree_leaves, tree_unflatten
from torchopt.tree_function import uncompiled

__all__ = ["certified_grad", "custom_fixed_point", "custom_root", "root_jvp", "root_vjp"]

OnFail = Literal["raise", "warn", "unroll", "ignore"]
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def custom_root(
    optimality_fn: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool = False,
    solve: Callable[..., Any] | None = None,
    *,
    symmetric: bool = False,
    positive_definite: bool = False,
    diagonal: bool = False,
    polish: int = 0,
    tol: float | None = None,
    on_fail: OnFail = "warn",
    report: Callable[[GradientReport], Any] | None = None,
) -> Decorator:
    """Return a decorator that differentiates a solver by the equation that its result solves.

    The derivatives are those of the root x(θ) of F(x, θ) = 0,

        dx/dθ = -A⁻¹ B,    A = ∂F/∂x,    B = ∂F/∂θ,

    not those of the steps of the solver, so memory does not grow with the number of steps. They
    exist to any order, in forward and reverse mode, under autograd and under `torch.func` (grad,
    vjp, jvp, jacrev, jacfwd, hessian, vmap).

    The solver runs outside any graph. If it needs gradients itself, use `torch.enable_grad()`,
    or `torch.func.grad`, which also works inside `torch.func` transforms.

    Args:
        optimality_fn: F(solution, *args), which is zero at the solution, a tree like the solution.
            It takes the arguments of solver_fn, with the solution in place of the start. Often
            it is `torch.func.grad(objective)`.
        argnums: Positions of the arguments of solver_fn that are differentiated, counted from 0.
            They are trees of tensors; 0, the start, is not allowed. Others get no gradient.
        has_aux: Whether solver_fn returns (solution, aux); aux gets no gradients.
        solve: Solves A u = v: a solver of `torchopt.linear_solve`, or a function of (matvec, b).
            None: chosen by size and tags, a factorisation up to 64 unknowns, then LSMR, or MINRES
            or CG if the tags below allow it; see `torchopt.linear_solve.Auto`.
        symmetric: Whether the Jacobian A is symmetric, which it is if F is a gradient.
        positive_definite: Whether A is also positive definite.
        diagonal: Whether A is diagonal, because F acts element by element. Then one product gives
            the whole matrix.
        polish: The number of Newton corrections of the solution before it is differentiated, >= 0;
            each one squares its error.
        tol: The largest ‖F(x)‖₂ that counts as solved; None: the residual is not computed.
        on_fail: What to do above `tol`: "raise", "warn", or "unroll", which differentiates through
            the steps of the solver instead. A solution with NaN raises with "raise" and warns with
            the other two. With "ignore" nothing is checked.
        report: Called with a `GradientReport` for every gradient, for example `.append` of a list.
            It costs about three more linear solves.

    Returns:
        The decorator. The solver takes (start, *args, **kwargs) and returns a tree of tensors.

    Raises:
        AssertionError: argnums is empty or contains 0.
        OptimalityError: In a call: ‖F(x)‖₂ is above `tol`, and `on_fail` is "raise".
        NotDifferentiableError: When a gradient is taken: F does not depend on an argument.

    Example:
        >>> import torch
        >>> @custom_root(lambda x, a: x**3 - a, argnums=1)
        ... def cube_root(start, a):
        ...     return a ** (1 / 3)
        >>> a = torch.tensor(8.0, dtype=torch.float64)
        >>> torch.func.grad(cube_root, argnums=1)(None, a)  # 1 / (3 x^2)
        tensor(0.0833, dtype=torch.float64)

    References:
        M. Blondel et al., Efficient and Modular Implicit Differentiation, NeurIPS 2022,
        https://arxiv.org/abs/2105.15183, equation 2
    """
    return ImplicitEngine(
        optimality_fn,
        _positions(argnums),
        has_aux,
        Auto(on_fail="warn") if solve is None else solve,
        symmetric,
        positive_definite,
        diagonal,
        polish,
        tol,
        on_fail,
        report,
    )


def _positions(argnums: Any) -> tuple[Any, ...]:
    """Return positions as a tuple; integers of numpy are accepted."""
    given = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
    return tuple(operator.index(i) if hasattr(i, "__index__") else i for i in given)


def custom_fixed_point(
    fixed_point_fn: Callable[..., Any],
    argnums: int | tuple[int, ...],
    has_aux: bool = False,
    solve: Callable[..., Any] | None = None,
    **options: Any,
) -> Decorator:
    """Return a decorator for a solver of x = T(x, θ): `custom_root` with F = T(x, θ) - x.

    Args:
        fixed_point_fn: T(solution, *args), a tree like the solution.
        argnums: See `custom_root`.
        has_aux: See `custom_root`.
        solve: See `custom_root`.
        **options: The keyword-only options of `custom_root`.

    Example:
        >>> import torch
        >>> T = lambda x, a: 0.5 * (x + a / x)
        >>> @custom_fixed_point(T, argnums=1)
        ... def square_root(x, a):
        ...     for _ in range(20):
        ...         x = T(x, a)
        ...     return x
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> square_root(torch.tensor(1.0), a).backward()
        >>> a.grad
        tensor(0.2500)
    """

    def optimality_fn(x: Any, *args: Any, **kwargs: Any) -> Any:
        return displacement(fixed_point_fn(x, *args, **kwargs), x)

    return custom_root(optimality_fn, argnums, has_aux, solve, **options)


def certified_grad(
    outer_fn: Callable[..., Tensor], solver: Callable[..., Any]
) -> Callable[..., tuple[Tensor, tuple[Any, ...], GradientReport]]:
    """Return a function for an outer loss, its implicit gradient and the error of that gradient.

    The solver returns an approximate solution x̂. The report has ‖F(x̂)‖, the residual of the
    linear system, its condition number, and an estimate of the error of the gradient. The estimate
    is the derivative of the gradient, including that of the outer loss, along A⁻¹F(x̂), plus the
    contribution of the linear residual. It is accurate to first order in the error of x̂, and the
    gradient minus `report.error` is accurate to second order. Nothing warns or raises: the report
    shows numerical failure.

    Args:
        outer_fn: (solution, *args, **kwargs) -> a 0-dim loss; args are the arguments of the solver
            without the start.
        solver: A solver decorated by `custom_root` or `custom_fixed_point`.

    Returns:
        A function with the arguments of the solver that returns (loss, gradients, report). The
        gradients are a tuple with one tree for each of argnums, in their order, with zeros for
        integer leaves. The function works under `torch.func.vmap`. It costs the gradient and about
        three more linear solves, and needs second derivatives of F.

    Raises:
        TypeError: `solver` is not a decorated solver.

    Example:
        >>> import torch
        >>> @custom_root(lambda x, a: x**2 - a, argnums=1)
        ... def square_root(x, a):
        ...     return 0.5 * (x + a / x)  # one step of Newton
        >>> start, a = torch.tensor(1.5), torch.tensor(2.0)
        >>> loss, (g,), report = certified_grad(lambda x, a: x, square_root)(start, a)
        >>> g, report.gradient_error  # the truth is 0.3536
        (tensor(0.3529), tensor(0.0006))
    """
    engine = getattr(solver, "engine", None)
    function = getattr(solver, "__wrapped__", None)
    if not isinstance(engine, ImplicitEngine) or function is None:
        raise TypeError(
            "certified_grad: solver: expected a function decorated by custom_root or "
            f"custom_fixed_point, got {solver!r}"
        )
    signature = inspect.signature(function)

    @functools.wraps(function)
    @uncompiled
    def certified(*args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Any, ...], GradientReport]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        rule, inputs = engine.prepare(function, bound.args, bound.kwargs)
        with torch.no_grad():
            outputs = rule.evaluate(*inputs)
        inputs = tuple(x.detach() for x in inputs)
        layout = rule.found["layout"]
        n = rule.num_differentiable_inputs

        def outer(x: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
            values, keywords = rule.equation.arguments((*theta, *inputs[n:]))
            return outer_fn(layout.unravel(x), *values[1:], **keywords)

        def trees(vector: Tensor) -> tuple[Any, ...]:
            parts = rule.unravel(inputs, vector)
            groups = {argnum: [parts[i] for i in group] for argnum, group in rule.groups}
            return tuple(_like(bound.args[i], groups[i]) for i in engine.argnums)

        adjoint = rule.adjoint(
            inputs,
            lambda x: torch.func.grad(outer)(x, inputs[:n]),
            lambda x: ravel_all(torch.func.grad(outer, 1)(x, inputs[:n])),
        )
        with torch.no_grad():
            x = layout.join(outputs[: len(layout.shapes)])
            gradient, report = adjoint.certified(x, trees)
            return outer(x, inputs[:n]), trees(gradient), report

    return certified


def _like(tree: Any, smooth: list[Tensor]) -> Any:
    """Return a tree with its smooth tensors replaced, and zeros for its other tensors."""
    leaves, spec = tree_flatten(tree)
    given = iter(smooth)
    return tree_unflatten(
        spec,
        [
            next(given) if x.is_floating_point() or x.is_complex() else torch.zeros_like(x)
            for x in leaves
        ],
    )


def _as_function(
    optimality_fn: Callable[..., Any], solution: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """Return the root as a function of the differentiable leaves of args, and those leaves."""
    leaves, spec = tree_flatten(args)
    places = [i for i, x in enumerate(leaves) if is_smooth(x)]
    if not places:
        raise TypeError(
            "root_vjp, root_jvp: args: expected at least one floating-point tensor, got none; with "
            "none there is nothing to differentiate"
        )

    def solver_fn(start: Any, chosen: list[Any]) -> Any:
        return start

    def optimality(x: Any, chosen: list[Any]) -> Any:
        filled = list(leaves)
        for i, value in zip(places, chosen):
            filled[i] = value
        rebuilt: Any = tree_unflatten(spec, filled)
        return optimality_fn(x, *rebuilt)

    solved = custom_root(optimality, 1, **options)(solver_fn)
    return lambda *chosen: solved(solution, list(chosen)), [leaves[i] for i in places]


@uncompiled
def root_vjp(
    optimality_fn: Callable[..., Any],
    solution: Any,
    args: tuple[Any, ...],
    cotangent: Any,
    **options: Any,
) -> Any:
    """Return the cotangents of args for a given root: Bᴴ u, where Aᴴ u = -cotangent.

    Args:
        optimality_fn: F(solution, *args).
        solution: The root, a tree of tensors.
        args: The other arguments of F.
        cotangent: A tree like the solution.
        **options: `solve`, `symmetric`, `positive_definite`, `polish` of `custom_root`.

    Returns:
        A tuple like args, with zeros for integer tensors and other leaves unchanged.

    Raises:
        TypeError: args contain no floating-point tensor.

    Example:
        >>> import torch
        >>> x, a, one = torch.tensor(2.0), torch.tensor(4.0), torch.tensor(1.0)
        >>> root_vjp(lambda x, a: x**2 - a, x, (a,), one)
        (tensor(0.2500),)
    """
    solved, chosen = _as_function(optimality_fn, solution, args, options)
    _, pull, *_ = torch.func.vjp(solved, *chosen)
    cotangents = iter(pull(cotangent))
    leaves, spec = tree_flatten(args)
    out = [
        (
            next(cotangents)
            if leaf.is_floating_point() or leaf.is_complex()
            else torch.zeros_like(leaf)
        )
        if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf in leaves
    ]
    return tree_unflatten(spec, out)


@uncompiled
def root_jvp(
    optimality_fn: Callable[..., Any],
    solution: Any,
    args: tuple[Any, ...],
    tangents: tuple[Any, ...],
    **options: Any,
) -> Any:
    """Return the tangent of a given root: -A⁻¹ B tangents.

    Args:
        optimality_fn: F(solution, *args).
        solution: The root, a tree of tensors.
        args: The other arguments of F.
        tangents: A tuple like args.
        **options: `solve`, `symmetric`, `positive_definite`, `polish` of `custom_root`.

    Returns:
        A tree like the solution.

    Raises:
        ValueError: tangents and args differ in the number of leaves.
        TypeError: args contain no floating-point tensor.

    Example:
        >>> import torch
        >>> x, a, one = torch.tensor(2.0), torch.tensor(4.0), torch.tensor(1.0)
        >>> root_jvp(lambda x, a: x**2 - a, x, (a,), (one,))
        tensor(0.2500)
    """
    solved, chosen = _as_function(optimality_fn, solution, args, options)
    leaves, directions = tree_leaves(args), tree_leaves(tangents)
    if len(leaves) != len(directions):
        raise ValueError(
            f"tangents: expected {len(leaves)} leaves, as args has, got {len(directions)}"
        )
    used = tuple(t for x, t in zip(leaves, directions) if is_smooth(x))
    return torch.func.jvp(solved, tuple(chosen), used)[1]
