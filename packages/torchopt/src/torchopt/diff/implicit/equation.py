# SPDX-License-Identifier: Apache-2.0
"""The equation that a solution solves, on vectors: its residual and its Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchopt.diff.surroundings import Surroundings
from torchopt.diff.twice_differentiable import TwiceDifferentiable
from torchopt.linear_solve.layout import Layout
from torchopt.linear_solve.operator import LinearOperator, Tag, transpose_linear
from torchopt.tree import PyTreeSpec, tree_unflatten
from torchopt.tree_function import linearize, linearize_parts

__all__ = ["Equation", "displacement"]

Tensors = tuple[Tensor, ...]
FlatMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Equation:
    """F(x, inputs) = 0 on lists of tensors.

    Attributes:
        optimality: F(x, *args, **kwargs) on trees.
        spec: The structure of ((x0, *args), kwargs).
        static: The leaves that are not tensors, by position.
        places: The position among the leaves of each input; the start comes last.
        surroundings: Everything that F reads besides its arguments.
        anew: Whether each evaluation draws new random numbers, for solvers of random products.
    """

    optimality: Callable[..., Any]
    spec: PyTreeSpec
    static: dict[int, Any]
    places: tuple[int, ...]
    surroundings: Surroundings
    anew: bool = False

    def arguments(self, inputs: Iterable[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ((x0, *args), kwargs); x0 is empty if the inputs do not include the start."""
        leaves = {**self.static, **dict(zip(self.places, inputs))}
        both: Any = tree_unflatten(self.spec, map(leaves.get, range(self.spec.num_leaves)))
        args, kwargs = both
        return args, kwargs

    def residual(self, layout: Layout, x: Tensor, inputs: Tensors) -> Tensor:
        """Return F as a vector.

        Raises:
            ValueError: The value of F is not a tree like x.
        """
        args, kwargs = self.arguments(inputs)
        mode = TwiceDifferentiable() if self.surroundings.may_exchange else nullcontext()
        with self.surroundings.replayed(anew=self.anew), mode:
            value = self.optimality(layout.unravel(x), *args[1:], **kwargs)
        what = (
            "optimality_fn: its value, such as the gradient of a loss, must have the structure and "
            "shapes of the solution"
        )
        return layout.ravel(value, what)

    def jacobian(
        self, layout: Layout, x: Tensor, inputs: Tensors, tags: frozenset[Tag]
    ) -> LinearOperator:
        """Return ∂F/∂x at x, with x and the inputs as its parameters."""

        def bind(x: Tensor, *inputs: Tensor) -> tuple[FlatMap, FlatMap]:
            _, pull = linearize(lambda v: self.residual(layout, v, inputs), x)
            return _products(lambda v: pull(v)[0], x, tags)

        return LinearOperator(bind, (x, *inputs), layout.pairs, tags)

    def linearized(
        self, layout: Layout, x: Tensor, inputs: Tensors, count: int, tags: frozenset[Tag]
    ) -> tuple[LinearOperator, Callable[[Tensor], tuple[Tensor, Tensors]]]:
        """Return A = ∂F/∂x at x, and the function u -> (F, Bᴴ u) for B = ∂F/∂θ.

        θ are the first `count` inputs. One evaluation of F serves both where nothing follows them.
        """

        def residual(*moved: Tensor) -> Tensor:
            return self.residual(layout, moved[0], (*moved[1:], *inputs[count:]))

        # Each product of a stochastic solver evaluates F again.
        both = None if self.anew else linearize_parts(residual, x, *inputs[:count])
        if both is None:

            def pull_theta(u: Tensor) -> tuple[Tensor, Tensors]:
                value, pull = linearize(lambda *theta: residual(x, *theta), *inputs[:count])
                return value, tuple(pull(u))

            return self.jacobian(layout, x, inputs, tags), pull_theta
        value, pull = both
        products = _products(lambda v: pull(v, slice(1))[0], x, tags)
        operator = LinearOperator(lambda *_: products, (x, *inputs), layout.pairs, tags)
        return operator, lambda u: (value, pull(u, slice(1, None)))


def _products(rmv: FlatMap, x: Tensor, tags: frozenset[Tag]) -> tuple[FlatMap, FlatMap]:
    """Return the products with A and Aᴴ, given the latter."""
    if Tag.SYMMETRIC in tags:
        return rmv, rmv
    pushes: list[FlatMap] = []

    def mv(v: Tensor) -> Tensor:
        if not pushes:
            pushes.append(transpose_linear(rmv, x))
        return pushes[0](v)

    return mv, rmv


def displacement(moved: Any, x: Any) -> Any:
    """Return T(x) - x.

    Raises:
        ValueError: T(x) is not a tree like x.
    """
    what = "fixed point: the value of T must have the structure and shapes of the solution"
    layout = Layout.of(x, "fixed point: solution", real=True)
    return layout.unravel(layout.ravel(moved, what) - layout.ravel(x))
