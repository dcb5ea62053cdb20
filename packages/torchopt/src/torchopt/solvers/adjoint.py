# SPDX-License-Identifier: Apache-2.0
"""Derivatives of a solver's solution by the explicit or the zero-order engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.closure import captured
from torchopt.diff.explicit.loop import Explicit
from torchopt.diff.implicit.inner import Implicit
from torchopt.diff.zero_order.engine import ZeroOrder
from torchopt.diff.zero_order.inner import sampled
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import has_tangent, in_forward_mode
from torchopt.tree import tree_leaves
from torchopt.tree_function import (
    below_transforms,
    derivatives_wanted,
    is_differentiated,
    is_transforming,
)

__all__ = ["by_another_engine", "require_adjoint", "require_constants"]


def require_adjoint(adjoint: Any, linear_solve: Any) -> None:
    """Raise unless a solver can get its derivatives from this engine.

    Args:
        adjoint: An engine without a problem, or None.
        linear_solve: The field of that name of the solver; an engine has its own.

    Raises:
        TypeError: `adjoint` is not an engine without a loss.
        ValueError: `adjoint` is an `Explicit` with other options, or `linear_solve` is also given.
    """
    if adjoint is None:
        return
    if not isinstance(adjoint, (Explicit, Implicit, ZeroOrder)) or adjoint.loss is not None:
        raise TypeError(
            "adjoint: expected None, Explicit(), Implicit(...) or ZeroOrder(...) of torchopt.diff, "
            f"without a loss, got {type(adjoint).__name__}"
            f"{' over a loss' if getattr(adjoint, 'loss', None) is not None else ''}."
        )
    if isinstance(adjoint, Explicit) and adjoint != Explicit():
        raise ValueError(
            "adjoint: expected Explicit() with its defaults: the iterations of a solver keep their "
            f"graph, and are differentiated in reverse mode; got {adjoint}."
        )
    if linear_solve is not None:
        raise ValueError(
            "linear_solve: expected None together with adjoint=, which has its own linear solver; "
            "pass adjoint=Implicit(solve=...)."
        )


def by_another_engine(
    solver: Any, run: Callable[[list[Tensor], bool], Any], chosen: list[Tensor]
) -> Any:
    """Return a solution, differentiable with respect to tensors.

    Args:
        solver: A solver whose `adjoint` is an `Explicit` or a `ZeroOrder`.
        run: Returns the `SolveResult` for given tensors; its second argument says whether the value
            keeps the graph of the iterations.
        chosen: The tensors to differentiate with respect to.
    """
    if isinstance(solver.adjoint, ZeroOrder):
        solution, _ = sampled(solver.adjoint, lambda x: (run(x, False).value, None), chosen)
        return solution
    solution = run(chosen, torch.is_grad_enabled()).value
    wanted = derivatives_wanted() and any(map(is_differentiated, chosen))
    if wanted and not any(map(is_differentiated, tree_leaves(solution))):
        raise NotDifferentiableError(
            f"{type(solver).__name__}: adjoint=Explicit(): expected iterations that depend on the "
            "arguments by differentiable operations, got a solution without a graph; its gradient "
            "would be zero. Use adjoint=None, which differentiates the equation."
        )
    return solution


def require_constants(reached: Any, solver: str) -> None:
    """Raise if a transform or forward mode differentiates a tensor that a run without derivatives
    reaches.

    Raises:
        NotDifferentiableError: There is such a tensor.
    """
    if not (is_transforming() or in_forward_mode()):
        return
    for name, x in captured(reached, Tensor):
        if is_differentiated(x, 1) or has_tangent(below_transforms(x)):
            raise NotDifferentiableError(
                f"{solver}.run: expected tensors without a derivative, got {name}, which "
                "torch.func or forward mode differentiates: run() has no derivatives, so that they "
                f"would silently be zero. Call {solver}()(function, start, *args) for them, or "
                "detach the tensor."
            )
