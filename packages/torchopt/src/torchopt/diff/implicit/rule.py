# SPDX-License-Identifier: Apache-2.0
"""The derivative rule of `ImplicitEngine`: the derivatives of one solution of an equation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.closure import explained, require_arguments
from torchopt.diff.implicit.certificate import Adjoint, Refined
from torchopt.diff.implicit.equation import Equation, Tensors
from torchopt.diff.implicit.settings import WHERE, Settings, solve_system, with_condition
from torchopt.errors import NotDifferentiableError
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import Tag
from torchopt.linear_solve.solver import push_forward, solve_vector
from torchopt.linear_solve.warm_start import WarmStart
from torchopt.shown import shown
from torchopt.torch_internals import without_saved_tensor_hooks
from torchopt.tree import tree_flatten, tree_leaves
from torchopt.tree_function import (
    below_transforms,
    is_batched,
    is_transforming,
    linearize,
    max_over_batch,
    plain_entry,
)

__all__ = ["RootRule", "ravel_all"]


@dataclass(frozen=True)
class RootRule:
    """The rule (inputs) -> (leaves of x, tensors of aux, ‖F(x)‖)."""

    engine: Settings
    solver_fn: Callable[..., Any]
    equation: Equation
    requires_grad: tuple[bool, ...]
    asked_for: tuple[bool, ...]  # whether the input is differentiated, at any level
    # For each of argnums in ascending order, the positions of its leaves among the inputs.
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    num_differentiable_inputs: int
    num_kept_inputs: int  # all but the start
    # Set by `evaluate`: the layout of x and the structure of aux.
    found: dict[str, Any] = field(default_factory=dict)

    needs_its_closure = False

    @property
    def num_differentiable_outputs(self) -> int:
        """The number of leaves of x."""
        return len(self.found["layout"].shapes)

    @without_saved_tensor_hooks()
    def evaluate(self, *inputs: Tensor) -> Tensors:
        """Return the result of the solver."""
        # Outside any graph. But tensors that required a gradient still do: the solver may take
        # gradients with respect to them inside `torch.enable_grad()`.
        detached = [x.detach() for x in inputs]
        if not is_transforming():
            for x, flag in zip(detached, self.requires_grad):
                x.requires_grad_(flag)
        args, kwargs = self.equation.arguments(detached)
        try:
            found = self.solver_fn(*args, **kwargs)
        except RuntimeError as error:
            if "does not require grad and does not have a grad_fn" not in str(error):
                raise
            raise NotDifferentiableError(
                f"{self.engine.where}: solver_fn runs without a graph, so torch found no gradient "
                "in it; put `with torch.enable_grad():` around what calls backward() or "
                "torch.autograd.grad, or use torch.func.grad"
            ) from error
        self.equation.surroundings.settle()
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
                f"{self.engine.where}: output of function solver_fn should be a tuple: "
                f"(output, aux) if has_aux is True. Got {shown(found)}"
            )
        return found

    def _layout(self, solution: Any) -> Layout:
        leaves = tree_leaves(solution)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise RuntimeError(
                f"{self.engine.where}: output of function solver_fn should be a torch.Tensor or a "
                "tuple of torch.Tensor (or another tree of tensors). Got "
                f"{shown(solution)}; return the solution, and pass has_aux=True to return more"
            )
        return Layout.of(solution, f"{WHERE}: output of function solver_fn", real=True)

    def _polish(self, layout: Layout, x: Tensor, inputs: Tensors) -> tuple[Tensor, Tensor]:
        """Return x after Newton corrections x - A⁻¹ F(x), and ‖F(x)‖.

        Without a tolerance the norm is not used; then it is 0, or NaN if x is not finite.
        """
        engine = self.engine
        for _ in range(engine.polish):
            residual = self.equation.residual(layout, x, inputs)
            operator = self.equation.jacobian(layout, x, inputs, self.tags)
            x = x - engine.linear(operator, residual)
        if engine.tol is None:
            size = torch.linalg.vector_norm(x.new_zeros(()))
            return x, torch.where(x.isfinite().all(), size, torch.nan)
        residual = self.equation.residual(layout, x, inputs)
        return x, torch.linalg.vector_norm(residual)

    @property
    def tags(self) -> frozenset[Tag]:
        """The known properties of ∂F/∂x on vectors, where complex numbers are coupled pairs."""
        tags = self.engine.known_tags
        return tags - {Tag.DIAGONAL} if self.found["layout"].is_paired else tags

    def explained(self) -> AbstractContextManager[None]:
        """Return a context that improves torch's errors about F; see `explained`."""
        return explained(self.engine.optimality_fn, self.engine.where, self.engine.remedy)

    @without_saved_tensor_hooks()
    def require_arguments(self, inputs: Tensors, outputs: Tensors) -> None:
        """Raise if F depends on differentiated tensors that are not its arguments.

        Raises:
            NotDifferentiableError: F depends on such tensors, or changes its arguments in place.
        """
        if self.equation.surroundings.is_sealed:
            return
        layout, engine = self.found["layout"], self.engine
        x = layout.join(map(plain_entry, outputs[: len(layout.shapes)]))
        known = tuple(map(plain_entry, inputs[: self.num_kept_inputs]))
        versions = [x._version for x in known if not x.is_inference()]
        value = self.equation.residual(layout, x, known)
        if versions != [x._version for x in known if not x.is_inference()]:
            raise NotDifferentiableError(
                f"{engine.where}: optimality_fn changes its arguments in place; expected a "
                "function that leaves them alone, since a derivative evaluates it several times. "
                "Change a clone."
            )
        require_arguments(value, (x, *known), engine.optimality_fn, engine.where, engine.remedy)
        if not is_transforming():
            self.equation.surroundings.watch(value.detach())

    def _partial(self, x: Tensor, inputs: Tensors) -> tuple[Callable[..., Tensor], Tensors]:
        """Return the function θ -> F(x, θ), and θ."""
        n = self.num_differentiable_inputs
        constants = inputs[n:]
        layout = self.found["layout"]

        def residual(*theta: Tensor) -> Tensor:
            return self.equation.residual(layout, x, (*theta, *constants))

        return residual, inputs[:n]

    @without_saved_tensor_hooks()
    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        """Return Bᴴ u where Aᴴ u = -x̄."""
        with self.explained():
            return self._pull_back(inputs, outputs, cotangents)

    def _pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        if self.num_differentiable_inputs == 0:
            return ()
        layout = self.found["layout"]
        x = layout.join(outputs[: len(layout.shapes)])
        cotangent = layout.join(cotangents)
        count = self.num_differentiable_inputs
        operator, pull = self.equation.linearized(layout, x, inputs, count, self.tags)
        u = self.engine.linear(operator.T, -cotangent)
        value, pulled = pull(u)
        self._require_unchanged(value)
        self._require_dependence(x, inputs, pulled, pulled)
        if self.engine.report is not None:
            self._report(x, inputs, cotangent)
        return pulled

    @without_saved_tensor_hooks()
    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        """Return -A⁻¹ B θ̇."""
        with self.explained():
            return self._push_forward(inputs, outputs, tangents)

    def _push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        layout = self.found["layout"]
        x = layout.join(outputs[: len(layout.shapes)])
        if self.num_differentiable_inputs == 0:
            return tuple(layout.split(torch.zeros_like(x)))
        operator = self.equation.jacobian(layout, x, inputs, self.tags)
        residual, theta = self._partial(x, inputs)
        rhs = -push_forward(residual, theta, tangents)
        self._require_dependence(x, inputs, (rhs,) * len(theta), tangents)
        return tuple(layout.split(self.engine.linear(operator, rhs)))

    def _require_unchanged(self, value: Tensor) -> None:
        """Raise if tensors in the closure of F have been changed in place since the solve."""
        names = () if is_transforming() else self.equation.surroundings.changed(value.detach())
        if names:
            raise NotDifferentiableError(
                f"{self.engine.where}: optimality_fn depends on {', '.join(names[:3])}, which was "
                "changed in place between the solve and its derivative; expected the values of the "
                "solve. Pass it as an argument, or do not change it before the backward pass."
            )

    def _require_dependence(
        self, x: Tensor, inputs: Tensors, derivatives: Tensors, asked: Tensors
    ) -> None:
        """Raise if F ignores an argument whose derivative was requested.

        The derivative of an ignored argument is zero, so only zero derivatives are examined.

        Args:
            x: The solution.
            inputs: The inputs.
            derivatives: The derivative for each differentiable input.
            asked: For each of them a tensor that is zero if nothing was requested: its tangent in
                forward mode, else the derivative itself.
        """
        forward = asked is not derivatives
        for argnum, group in self.groups:
            if not any(inputs[i].numel() for i in group):
                continue
            if _any_nonzero(derivatives[i] for i in group):
                continue
            if forward and not _any_nonzero(asked[i] for i in group):
                continue
            if any(self.asked_for[i] for i in group) and not self._depends(x, inputs, group):
                raise NotDifferentiableError(
                    f"{self.engine.where}: optimality_fn does not depend on argument {argnum} of "
                    "solver_fn, which is in argnums; expected F(solution, *args) that does. Its "
                    "gradient would be zero. Use the argument in optimality_fn (without .detach(), "
                    ".data or .item()), or take it out of argnums."
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
        # Without warm start, because this is not one of the caller's solves.
        first = engine.solver.solver if isinstance(engine.solver, WarmStart) else engine.solver
        refined = Refined(first)

        def mixed(x: Tensor, u: Tensor) -> Tensor:
            residual, theta = self._partial(x, inputs)
            _, pull = linearize(residual, *theta)
            return ravel_all(pull(u))

        return Adjoint(
            residual=lambda x: self.equation.residual(layout, x, inputs),
            jacobian=lambda x: self.equation.jacobian(layout, x, inputs, self.tags),
            mixed=mixed,
            cotangent=cotangent,
            direct=direct,
            # Failures are in the report.
            solve=lambda operator, b: solve_system(solver, operator, b, "ignore"),
            accurate=lambda operator, b: solve_vector(refined, operator, b, (), "ignore"),
        )

    def unravel(self, inputs: Tensors, vector: Tensor) -> Tensors:
        """Split a vector over all differentiable inputs into tensors like them."""
        chosen = inputs[: self.num_differentiable_inputs]
        parts = vector.split([x.numel() for x in chosen])
        return tuple(v.reshape(x.shape).to(x.dtype) for v, x in zip(parts, chosen))

    def _report(self, x: Tensor, inputs: Tensors, cotangent: Tensor) -> None:
        """Pass the report to the callback of the engine."""
        assert self.engine.report is not None
        x, cotangent = _plain(x), _plain(cotangent)
        inputs = tuple(map(_plain, inputs))
        adjoint = self.adjoint(inputs, lambda _: cotangent, lambda _: torch.zeros(()).to(x))
        with torch.no_grad():
            _, report = adjoint.certified(x, lambda vector: self.unravel(inputs, vector))
        self.engine.report(report)


def _any_nonzero(tensors: Iterable[Tensor]) -> bool:
    """Return whether any number is nonzero, in any entry of a batch."""
    flags = [(x != 0).any() for x in tensors]
    return bool(int(max_over_batch(torch.stack(flags).any().long())))


def _plain(x: Tensor) -> Tensor:
    """Return the tensor below the wrappers of torch.func.

    Raises:
        NotDifferentiableError: The tensor belongs to a vmap.
    """
    if is_batched(x):
        raise NotDifferentiableError(
            f"{WHERE}: report: expected no torch.func.vmap around the gradient, because the "
            "numbers of a batch cannot leave it through a callback. Use certified_grad inside "
            "of the vmap, which returns them."
        )
    return below_transforms(x).detach()


def ravel_all(tensors: Iterable[Tensor]) -> Tensor:
    """Return several tensors as one vector."""
    return torch.cat([x.reshape(x.numel()) for x in tensors])
