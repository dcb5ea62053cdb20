# SPDX-License-Identifier: Apache-2.0
"""Implicit differentiation of the solution of an equation.

x(θ) is defined by F(x(θ), θ) = 0, however it was found. With A = ∂F/∂x and B = ∂F/∂θ at x(θ),

    ẋ = -A⁻¹ B θ̇                    forward
    θ̄ = Bᴴ u  where  Aᴴ u = -x̄      reverse

by the implicit function theorem. Both consist of differentiable operations in θ and in x, which is
itself such a solution, so all higher derivatives follow.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.closure import ATOMS
from torchopt.diff.implicit.equation import Equation
from torchopt.diff.implicit.rule import RootRule
from torchopt.diff.implicit.settings import WHERE, Settings
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import TorchOptError, warn_caller
from torchopt.linear_solve.layout import Layout
from torchopt.shown import shown
from torchopt.tree import is_smooth, tree_flatten, tree_leaves, tree_unflatten
from torchopt.tree_function import (
    apply_releasable_rule,
    derivatives_wanted,
    is_differentiated,
    is_tracked,
    max_over_batch,
    uncompiled,
)

__all__ = ["ImplicitEngine", "OptimalityError", "OptimalityWarning"]

Tensors = tuple[Tensor, ...]
_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD


class OptimalityError(TorchOptError, RuntimeError):
    """A solver returned something that is not a root of the optimality function."""


class OptimalityWarning(UserWarning):
    """A solver returned something that is not a root of the optimality function."""


@dataclass(frozen=True)
class ImplicitEngine(Settings):
    """Settings of implicit differentiation, which `ImplicitEngine(F, argnums)(solver_fn)` applies.

    Attributes:
        optimality_fn: F(solution, *args), zero at the solution, a tree like the solution.
        argnums: Positions of the arguments of solver_fn that are differentiated, counted from 0;
            0, the start of the solver, is not allowed.
        has_aux: Whether solver_fn returns (solution, aux).
        solve: Solves A u = v: a `Solver`, or a function of (matvec, b).
        symmetric: Whether ∂F/∂x is Hermitian, which it is if F is a gradient. It saves half of the
            work of forward mode and of normal equations, and lets `Auto` choose a better solver.
        positive_definite: Whether ∂F/∂x is also positive definite.
        diagonal: Whether ∂F/∂x is diagonal, because F acts element by element.
        polish: The number of Newton corrections x - A⁻¹ F(x) of the solver's result, >= 0. An error
            e of the solution causes an error O(e) of the gradient; each correction squares e.
        tol: The largest ‖F(x)‖₂ that counts as solved; None: it is not computed.
        on_fail: What to do above `tol` or with NaN: "raise", "warn", or "unroll", which returns the
            result of `solver_fn` with the derivatives of its steps. With "ignore" nothing is
            checked.
        report: Called with a `GradientReport` for every gradient that is pulled back. Its estimate
            is for the cotangent of that gradient; `certified_grad` includes the outer loss.
        where: The beginning of messages.
        remedy: The end of the message if F depends on tensors that are not its arguments.

    Raises:
        AssertionError: `argnums` is empty or contains 0.
        TypeError: `argnums` are not integers.
        ValueError: `argnums`, `polish` or `on_fail` is out of its range.

    Example:
        >>> import torch
        >>> from torchopt.diff.implicit import ImplicitEngine
        >>> engine = ImplicitEngine(lambda x, a: x**2 - a, (1,), diagonal=True)
        >>> square_root = engine(lambda start, a: a.sqrt())
        >>> torch.func.grad(square_root, argnums=1)(None, torch.tensor(4.0))  # 1 / (2 x)
        tensor(0.2500)
    """

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return solver_fn with implicit derivatives."""
        signature = inspect.signature(function)
        kinds = {p.kind for p in signature.parameters.values()}
        positional = kinds <= {inspect.Parameter.POSITIONAL_ONLY, _EITHER}

        @functools.wraps(function)
        @uncompiled
        def solved(*args: Any, **kwargs: Any) -> Any:
            if not positional or kwargs or len(args) != len(signature.parameters):
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                args, kwargs = bound.args, bound.kwargs
            return self._solve(function, args, kwargs)

        solved.engine = self  # type: ignore[attr-defined]  # for certified_grad
        return solved

    def prepare(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> tuple[RootRule, Tensors]:
        """Return the rule for one call of solver_fn, and its inputs."""
        self._check_arguments(args)
        _check_keywords(self.optimality_fn, kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        owners = self._owners(args, len(leaves))
        starts = len(tree_leaves(args[0])) if args else 0
        # First the differentiated tensors, then the constants, then the start.
        order = sorted(
            (i for i, x in enumerate(leaves) if isinstance(x, Tensor)),
            key=lambda i: (i < starts, owners[i] is None),
        )
        static = {i: x for i, x in enumerate(leaves) if not isinstance(x, Tensor)}
        inputs = tuple(leaves[i] for i in order)
        place = {leaf: i for i, leaf in enumerate(order)}
        groups = tuple(
            (argnum, tuple(place[i] for i, owner in enumerate(owners) if owner == argnum))
            for argnum in sorted(set(self.argnums))
        )
        held = [x for x in static.values() if not isinstance(x, ATOMS)]
        reached: Any = (self.optimality_fn, held) if held else self.optimality_fn
        rule = RootRule(
            self,
            function,
            Equation(
                self.optimality_fn,
                spec,
                static,
                tuple(order),
                Surroundings(reached, inputs),
                self.solver.is_stochastic,
            ),
            tuple(x.requires_grad for x in inputs),
            tuple(map(is_differentiated, inputs)),
            groups,
            sum(owner is not None for owner in owners),
            sum(i >= starts for i in order),
        )
        return rule, inputs

    def _solve(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        rule, inputs = self.prepare(function, args, kwargs)
        with rule.explained():
            outputs = apply_releasable_rule(rule, *inputs)
        if derivatives_wanted():
            rule.require_arguments(inputs, outputs)
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
        """Return the result of solver_fn with the derivatives of its steps.

        Raises:
            OptimalityError: The result has no graph.
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
                    f"Got {shown(args[i])} at position {i}; make it a tensor, or leave it out of "
                    "argnums"
                )

    def _owners(self, args: tuple[Any, ...], count: int) -> list[int | None]:
        """Return for each leaf the position of its argument, None if it is not differentiated."""
        owners: list[int | None] = []
        for i, arg in enumerate(args):
            for leaf in tree_leaves(arg):
                owners.append(i if i in self.argnums and is_smooth(leaf) else None)
        return owners + [None] * (count - len(owners))

    def _accept(self, size: Tensor) -> bool:
        """Return whether to keep the solution, given ‖F(x)‖; False: unroll. Reads one number."""
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
        warn_caller(message, OptimalityWarning)
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
            "solution in place of the start."
        )
