# SPDX-License-Identifier: Apache-2.0
"""Implicit differentiation of the solution of an equation.

x(θ) is defined by F(x(θ), θ) = 0, whatever way it was found. With A = ∂F/∂x and B = ∂F/∂θ there,

    ẋ = -A⁻¹ B θ̇                    forward
    θ̄ = Bᴴ u  where  Aᴴ u = -x̄      reverse

(the implicit function theorem). Both are made of differentiable operations in x, which is again a
solution, and in θ; so every further derivative follows.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from torchopt.diff.implicit.certificate import Adjoint, GradientReport
from torchopt.errors import NotDifferentiableError, TorchOptError
from torchopt.linear_solve.auto import Auto
from torchopt.linear_solve.callable import as_solver
from torchopt.linear_solve.operator import Layout, LinearOperator, Tag, transpose_linear
from torchopt.linear_solve.result import Stats
from torchopt.linear_solve.solver import Solver, push_forward, solve_vector
from torchopt.linear_solve.warm_start import WarmStart
from torchopt.tree import PyTreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torchopt.tree_function import apply_rule, is_tracked, is_transforming, max_over_batch

__all__ = ["ImplicitEngine", "OptimalityError", "OptimalityWarning"]

Tensors = tuple[Tensor, ...]
FlatMap = Callable[[Tensor], Tensor]

WHERE = "custom_root(optimality_fn)(solver_fn)(*args)"


class OptimalityError(TorchOptError, RuntimeError):
    """A solver returned something that is no root of the optimality function."""


class OptimalityWarning(UserWarning):
    """A solver returned something that is no root of the optimality function."""


@dataclass(frozen=True)
class Equation:
    """F(x, inputs) = 0 on lists of tensors.

    Attributes:
        optimality: F(x, *args, **kwargs) on trees.
        spec: The structure of ((x0, *args), kwargs).
        static: The leaves that are no tensors, by position.
        places: The position among the leaves of each input.
    """

    optimality: Callable[..., Any]
    spec: PyTreeSpec
    static: dict[int, Any]
    places: tuple[int, ...]

    def arguments(self, inputs: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ((x0, *args), kwargs)."""
        leaves = {**self.static, **dict(zip(self.places, inputs))}
        both: Any = tree_unflatten(self.spec, [leaves[i] for i in range(len(leaves))])
        args, kwargs = both
        return args, kwargs

    def residual(self, layout: Layout, x: Tensor, inputs: Tensors) -> Tensor:
        """Return F as a vector.

        Raises:
            ValueError: F is no tree like x.
        """
        args, kwargs = self.arguments(inputs)
        value = self.optimality(layout.unravel(x), *args[1:], **kwargs)
        return layout.ravel(
            value, "optimality_fn: its value must have the structure and shapes of the solution"
        )

    def jacobian(
        self, layout: Layout, x: Tensor, inputs: Tensors, tags: frozenset[Tag]
    ) -> LinearOperator:
        """Return ∂F/∂x at x, with x and the inputs as its parameters."""

        def bind(x: Tensor, *inputs: Tensor) -> tuple[FlatMap, FlatMap]:
            _, pull, *_ = torch.func.vjp(lambda v: self.residual(layout, v, inputs), x)

            def rmv(v: Tensor) -> Tensor:
                return pull(v)[0]  # type: ignore[no-any-return]

            if Tag.SYMMETRIC in tags:
                return rmv, rmv
            pushes: list[FlatMap] = []

            def mv(v: Tensor) -> Tensor:
                if not pushes:
                    pushes.append(transpose_linear(rmv, x))
                return pushes[0](v)

            return mv, rmv

        return LinearOperator(bind, (x, *inputs), layout, tags)


@dataclass(frozen=True)
class _Root:
    """The rule (inputs) -> (leaves of x, tensors of aux, ‖F(x)‖)."""

    engine: ImplicitEngine
    solver_fn: Callable[..., Any]
    equation: Equation
    requires_grad: tuple[bool, ...]
    # For each of argnums in ascending order, the places of its leaves among the inputs.
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    num_differentiable_inputs: int
    # What `evaluate` learns: the layout of x and the structure of aux.
    found: dict[str, Any] = field(default_factory=dict)

    needs_its_closure = False

    @property
    def num_differentiable_outputs(self) -> int:
        return len(self.found["layout"].shapes)

    def evaluate(self, *inputs: Tensor) -> Tensors:
        # Outside of any graph, but tensors that required a gradient still do: a solver may ask for
        # gradients with respect to them inside `torch.enable_grad()`.
        detached = [x.detach() for x in inputs]
        if not is_transforming():
            for x, flag in zip(detached, self.requires_grad):
                x.requires_grad_(flag)
        args, kwargs = self.equation.arguments(detached)
        found = self.solver_fn(*args, **kwargs)
        solution, aux = self._split_aux(found)
        layout = self._layout(solution)
        aux_leaves, aux_spec = tree_flatten(aux)
        tensors = [x for x in aux_leaves if isinstance(x, Tensor)]
        static = [None if isinstance(x, Tensor) else x for x in aux_leaves]
        is_tensor = [isinstance(x, Tensor) for x in aux_leaves]
        self.found.update(layout=layout, aux_spec=aux_spec, static=static, is_tensor=is_tensor)
        x = layout.join([leaf.detach() for leaf in tree_leaves(solution)])
        x, size = self._polish(layout, x, inputs)
        return (*(y.clone() for y in layout.split(x)), *(t.detach().clone() for t in tensors), size)

    def _split_aux(self, found: Any) -> tuple[Any, Any]:
        if not self.engine.has_aux:
            return found, None
        if not (isinstance(found, tuple) and len(found) == 2):
            raise RuntimeError(
                f"{WHERE}: output of function solver_fn should be a tuple: (output, aux) if "
                f"has_aux is True. Got {found!r}"
            )
        return found

    def _layout(self, solution: Any) -> Layout:
        leaves = tree_leaves(solution)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise RuntimeError(
                f"{WHERE}: output of function solver_fn should be a torch.Tensor or a tuple of "
                f"torch.Tensor (or another tree of tensors). Got {solution!r}"
            )
        return Layout.of(solution, f"{WHERE}: output of function solver_fn")

    def _polish(self, layout: Layout, x: Tensor, inputs: Tensors) -> tuple[Tensor, Tensor]:
        """Return x after Newton's corrections x - A⁻¹ F(x), and ‖F(x)‖.

        Without a tolerance nobody wants the norm: it is 0 then, or NaN if x is not finite.
        """
        engine = self.engine
        for _ in range(engine.polish):
            residual = self.equation.residual(layout, x, inputs)
            operator = self.equation.jacobian(layout, x, inputs, engine.known_tags)
            x = x - engine.linear(operator, residual)
        if engine.tol is None:
            size = torch.linalg.vector_norm(x.new_zeros(()))
            return x, torch.where(x.isfinite().all(), size, torch.nan)
        residual = self.equation.residual(layout, x, inputs)
        return x, torch.linalg.vector_norm(residual)

    def _partial(self, x: Tensor, inputs: Tensors) -> tuple[Callable[..., Tensor], Tensors]:
        """Return θ -> F(x, θ), and θ."""
        n = self.num_differentiable_inputs
        constants = inputs[n:]
        layout = self.found["layout"]

        def residual(*theta: Tensor) -> Tensor:
            return self.equation.residual(layout, x, (*theta, *constants))

        return residual, inputs[:n]

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        if self.num_differentiable_inputs == 0:
            return ()
        layout = self.found["layout"]
        x = layout.join(outputs[: len(layout.shapes)])
        cotangent = layout.join(cotangents)
        operator = self.equation.jacobian(layout, x, inputs, self.engine.known_tags)
        u = self.engine.linear(operator.T, -cotangent)
        residual, theta = self._partial(x, inputs)
        _, pull, *_ = torch.func.vjp(residual, *theta)
        pulled = tuple(pull(u))
        self._require_dependence(x, inputs, pulled, pulled)
        if self.engine.report is not None:
            self._report(x, inputs, cotangent)
        return pulled

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        layout = self.found["layout"]
        x = layout.join(outputs[: len(layout.shapes)])
        if self.num_differentiable_inputs == 0:
            return tuple(layout.split(torch.zeros_like(x)))
        operator = self.equation.jacobian(layout, x, inputs, self.engine.known_tags)
        residual, theta = self._partial(x, inputs)
        rhs = -push_forward(residual, theta, tangents)
        self._require_dependence(x, inputs, (rhs,) * len(theta), tangents)
        return tuple(layout.split(self.engine.linear(operator, rhs)))

    def _require_dependence(
        self, x: Tensor, inputs: Tensors, derivatives: Tensors, asked: Tensors
    ) -> None:
        """Raise if F ignores an argument whose derivative was asked for.

        The derivative of an ignored argument is zero, so only a zero one is looked at closely.

        Args:
            x: The solution.
            inputs: The inputs.
            derivatives: For each differentiable input, what came out for it.
            asked: For each of them, what is zero where nothing was asked: a tangent, or the same.
        """
        forward = asked is not derivatives
        for argnum, group in self.groups:
            if not any(inputs[i].numel() for i in group):
                continue
            if _any_nonzero(derivatives[i] for i in group):
                continue
            if forward and not _any_nonzero(asked[i] for i in group):
                continue
            wanted = is_transforming() or any(self.requires_grad[i] for i in group)
            if wanted and not self._depends(x, inputs, group):
                raise NotDifferentiableError(
                    f"{WHERE}: optimality_fn does not depend on argument {argnum} of solver_fn, "
                    "which is in argnums; expected F(solution, *args) that does. Its gradient "
                    "would be zero. Use the argument in optimality_fn (without .detach(), .data or "
                    ".item()), or take it out of argnums."
                )

    def _depends(self, x: Tensor, inputs: Tensors, group: tuple[int, ...]) -> bool:
        found: list[bool] = []

        def residual(*leaves: Tensor) -> Tensor:
            filled = list(inputs)
            for i, leaf in zip(group, leaves):
                filled[i] = leaf
            value = self.equation.residual(self.found["layout"], x, tuple(filled))
            found.append(value.requires_grad)
            return value

        torch.func.vjp(residual, *(inputs[i].detach() for i in group))
        return found[0]

    def adjoint(
        self,
        inputs: Tensors,
        cotangent: Callable[[Tensor], Tensor],
        direct: Callable[[Tensor], Tensor],
    ) -> Adjoint:
        """Return the gradient as a function of the solution; see `Adjoint`."""
        layout, engine = self.found["layout"], self.engine
        solver = with_condition(engine.solver)

        def mixed(x: Tensor, u: Tensor) -> Tensor:
            residual, theta = self._partial(x, inputs)
            _, pull, *_ = torch.func.vjp(residual, *theta)
            return ravel_all(pull(u))

        return Adjoint(
            residual=lambda x: self.equation.residual(layout, x, inputs),
            jacobian=lambda x: self.equation.jacobian(layout, x, inputs, engine.known_tags),
            mixed=mixed,
            cotangent=cotangent,
            direct=direct,
            # What fails is told in the report.
            solve=lambda operator, b: _solve_system(solver, operator, b, "ignore"),
        )

    def unravel(self, inputs: Tensors, vector: Tensor) -> Tensors:
        """Return a vector over all differentiable inputs as tensors like them."""
        chosen = inputs[: self.num_differentiable_inputs]
        parts = vector.split([x.numel() for x in chosen])
        return tuple(v.reshape(x.shape).to(x.dtype) for v, x in zip(parts, chosen))

    def _report(self, x: Tensor, inputs: Tensors, cotangent: Tensor) -> None:
        """Give the report to the caller of the engine."""
        assert self.engine.report is not None
        x, cotangent = _plain(x), _plain(cotangent)
        inputs = tuple(map(_plain, inputs))
        adjoint = self.adjoint(inputs, lambda _: cotangent, lambda _: torch.zeros(()).to(x))
        with torch.no_grad():
            _, report = adjoint.certified(x, lambda vector: self.unravel(inputs, vector))
        self.engine.report(report)


def displacement(moved: Any, x: Any) -> Any:
    """Return T(x) - x.

    Raises:
        ValueError: T(x) is no tree like x.
    """
    what = "fixed point: the value of T must have the structure and shapes of the solution"
    layout = Layout.of(x, "fixed point: solution")
    return layout.unravel(layout.ravel(moved, what) - layout.ravel(x))


def _any_nonzero(tensors: Iterable[Tensor]) -> bool:
    """Return whether there is a number other than zero, in any entry of a batch."""
    flags = [(x != 0).any() for x in tensors]
    return bool(int(max_over_batch(torch.stack(flags).any().long())))


def _plain(x: Tensor) -> Tensor:
    """Return the tensor below the wrappers of torch.func.

    Raises:
        NotDifferentiableError: It belongs to a vmap.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            raise NotDifferentiableError(
                f"{WHERE}: report: expected no torch.func.vmap around the gradient, because the "
                "numbers of a batch cannot leave it by a callback. Use certified_grad inside of "
                "the vmap: it returns them."
            )
        x = functorch.get_unwrapped(x)
    return x.detach()


def ravel_all(tensors: Iterable[Tensor]) -> Tensor:
    """Return one vector of several tensors."""
    return torch.cat([x.reshape(x.numel()) for x in tensors])


def with_condition(solver: Solver) -> Solver:
    """Return the solver, asked for the condition number if it knows one."""
    if isinstance(solver, WarmStart):
        return replace(solver, solver=with_condition(solver.solver))
    if any(f.name == "estimate_condition" for f in fields(solver)):
        return replace(solver, estimate_condition=True)  # type: ignore[call-arg]  # just looked
    return solver


def _solve_system(
    solver: Solver, operator: LinearOperator, b: Tensor, on_fail: Literal["raise", "warn", "ignore"]
) -> tuple[Tensor, Stats, Tensor]:
    """Return A⁻¹ b, statistics and status."""
    start = solver.start(operator.layout)
    starts = () if start is None else (start,)
    solver, operator, b = solver.reformulate(operator, b)
    return solve_vector(solver, operator, b, starts, on_fail)


@dataclass(frozen=True)
class ImplicitEngine:
    """Implicit differentiation as a value: `ImplicitEngine(F, argnums)(solver_fn)`.

    Attributes:
        optimality_fn: F(solution, *args): zero at the solution, a tree like it.
        argnums: The arguments of solver_fn that are differentiated, counted from 0; not 0, which
            is where the solver starts.
        has_aux: solver_fn returns (solution, aux).
        solve: Solves A u = v: a `Solver`, or a function of (matvec, b).
        symmetric: ∂F/∂x is Hermitian, as it is when F is a gradient. Saves half of the work of
            forward mode and of normal equations, and lets `Auto` choose a better solver.
        positive_definite: It is positive definite too.
        diagonal: It is diagonal: F acts element by element.
        polish: So many Newton corrections x - A⁻¹ F(x) of what the solver returns. An error e of
            the solution makes an error O(e) of the gradient; each correction squares it.
        tol: The largest ‖F(x)‖₂ that counts as solved; None: it is not looked at.
        on_fail: What to do above `tol`, or with NaN: "raise", "warn", or "unroll": return what
            `solver_fn` computes with its own derivatives, through all of its steps. "ignore":
            nothing is checked.
        report: Called with a `GradientReport` for every gradient that is pulled back. Its estimate
            is for the cotangent that came; `certified_grad` knows the outer loss too.
    """

    optimality_fn: Callable[..., Any]
    argnums: tuple[int, ...]
    has_aux: bool = False
    solve: Callable[..., Any] = field(default_factory=lambda: Auto(on_fail="warn"))
    symmetric: bool = False
    positive_definite: bool = False
    diagonal: bool = False
    polish: int = 0
    tol: float | None = None
    on_fail: Literal["raise", "warn", "unroll", "ignore"] = "warn"
    report: Callable[[GradientReport], Any] | None = None

    def __post_init__(self) -> None:
        if not self.argnums or any(i == 0 for i in self.argnums):
            raise AssertionError(
                "argnums: expected positions of arguments of solver_fn other than 0, which is the "
                f"start of the solver and does not determine the solution; got {self.argnums}"
            )
        if any(i < 0 for i in self.argnums):
            raise ValueError(f"argnums: expected positions counted from 0, got {self.argnums}")
        if self.polish < 0:
            raise ValueError(f"polish: expected a count >= 0, got {self.polish}")
        if self.on_fail not in ("raise", "warn", "unroll", "ignore"):
            raise ValueError(
                f"on_fail: expected 'raise', 'warn', 'unroll' or 'ignore', got {self.on_fail!r}"
            )

    @functools.cached_property
    def solver(self) -> Solver:
        """`solve` as a solver."""
        return as_solver(self.solve)

    @property
    def known_tags(self) -> frozenset[Tag]:
        """What is known of ∂F/∂x."""
        tags = set()
        if self.symmetric or self.positive_definite:
            tags.add(Tag.SYMMETRIC)
        if self.positive_definite:
            tags.add(Tag.POSITIVE_DEFINITE)
        if self.diagonal:
            tags.add(Tag.DIAGONAL)
        return frozenset(tags)

    def linear(self, operator: LinearOperator, b: Tensor) -> Tensor:
        """Return A⁻¹ b."""
        solver = self.solver
        return _solve_system(solver, operator, b, solver.failure)[0]

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return solver_fn with implicit derivatives."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def solved(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return self._solve(function, bound.args, bound.kwargs)

        solved.engine = self  # type: ignore[attr-defined]  # for certified_grad
        return solved

    def prepare(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> tuple[_Root, Tensors]:
        """Return the rule for one call of solver_fn, and its inputs."""
        self._check_arguments(args)
        _check_keywords(self.optimality_fn, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        owners = self._owners(args, len(leaves))
        order = sorted(
            (i for i, x in enumerate(leaves) if isinstance(x, Tensor)),
            key=lambda i: owners[i] is None,
        )
        static = {i: x for i, x in enumerate(leaves) if not isinstance(x, Tensor)}
        inputs = tuple(leaves[i] for i in order)
        place = {leaf: i for i, leaf in enumerate(order)}
        groups = tuple(
            (argnum, tuple(place[i] for i, owner in enumerate(owners) if owner == argnum))
            for argnum in sorted(set(self.argnums))
        )
        rule = _Root(
            self,
            function,
            Equation(self.optimality_fn, spec, static, tuple(order)),
            tuple(x.requires_grad for x in inputs),
            groups,
            sum(owner is not None for owner in owners),
        )
        return rule, inputs

    def _solve(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        rule, inputs = self.prepare(function, args, kwargs)
        outputs = apply_rule(rule, *inputs)
        if not self._accept(outputs[-1]):
            return self._unroll(function, args, kwargs, inputs[: rule.num_differentiable_inputs])
        layout: Layout = rule.found["layout"]
        n = len(layout.shapes)
        solution = tree_unflatten(layout.spec, outputs[:n])
        if not self.has_aux:
            return solution
        tensors = iter(outputs[n:-1])
        aux = [
            next(tensors) if is_tensor else x
            for is_tensor, x in zip(rule.found["is_tensor"], rule.found["static"])
        ]
        return solution, tree_unflatten(rule.found["aux_spec"], aux)

    def _unroll(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, chosen: Tensors
    ) -> Any:
        """Return what solver_fn returns, with the derivatives of its steps.

        Raises:
            OptimalityError: It has none.
        """
        found = function(*args, **kwargs)
        solution = found[0] if self.has_aux else found
        wanted = torch.is_grad_enabled() and any(is_tracked(x) for x in chosen)
        if wanted and not any(is_tracked(x) for x in tree_leaves(solution)):
            raise OptimalityError(
                f"{WHERE}: on_fail='unroll': expected steps of solver_fn that can be "
                "differentiated, got a result without a graph; its gradient would be zero. Do not "
                "use torch.no_grad(), .detach(), .data or in-place updates of leaves in solver_fn, "
                "or pass polish=1, or on_fail='raise'."
            )
        return found

    def _check_arguments(self, args: tuple[Any, ...]) -> None:
        for i in self.argnums:
            if i >= len(args):
                raise ValueError(
                    f"argnums: expected positions of the {len(args)} positional arguments of "
                    f"solver_fn, got {i}"
                )
            leaves = tree_leaves(args[i])
            if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
                raise RuntimeError(
                    f"{WHERE}: argument of function solver_fn specified with `argnums` should be a "
                    f"torch.Tensor or a tuple of torch.Tensor (or another tree of tensors). "
                    f"Got {args[i]!r} at position {i}"
                )

    def _owners(self, args: tuple[Any, ...], count: int) -> list[int | None]:
        """Return for each leaf the position of its argument, None if it is not differentiated."""
        owners: list[int | None] = []
        for i, arg in enumerate(args):
            for leaf in tree_leaves(arg):
                smooth = isinstance(leaf, Tensor) and (
                    leaf.is_floating_point() or leaf.is_complex()
                )
                owners.append(i if i in self.argnums and smooth else None)
        return owners + [None] * (count - len(owners))

    def _accept(self, size: Tensor) -> bool:
        """Return whether ‖F(x)‖ is small enough, or may be too large. Reads one number."""
        if self.on_fail == "ignore":
            return True
        bad = ~(size <= (math.inf if self.tol is None else self.tol))
        if not int(max_over_batch(bad.long())):
            return True
        if int(max_over_batch(size.isnan().long())):
            message = (
                f"{WHERE}: expected a finite solution and residual, got NaN or infinity. Check the "
                "arguments and the start, take smaller steps in solver_fn, or bound them "
                "(torchopt.clip_grad_norm); in half precision, solve in float32."
            )
        else:
            message = (
                f"{WHERE}: expected ‖optimality_fn(solution)‖ ≤ {self.tol}, got more. The implicit "
                "gradient is that of another point. Run the solver longer, pass polish=1, or "
                "on_fail='unroll'."
            )
            if self.on_fail == "unroll":
                return False
        if self.on_fail == "raise":
            raise OptimalityError(message)
        warnings.warn(message, OptimalityWarning, stacklevel=4)
        return True


def _check_keywords(optimality_fn: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """Raise unless the optimality function takes the keyword-only arguments of the solver."""
    if not kwargs:
        return
    parameters = inspect.signature(optimality_fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    unknown = sorted(kwargs.keys() - known)
    if unknown:
        raise TypeError(
            "keyword arguments to solver_fn could not be resolved to positional arguments of "
            f"optimality_fn: {unknown}. Give optimality_fn the arguments of solver_fn, with the "
            "solution in the place of the start."
        )
