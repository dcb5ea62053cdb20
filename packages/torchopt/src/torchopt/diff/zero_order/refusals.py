# SPDX-License-Identifier: Apache-2.0
"""Errors for derivatives that an estimate does not have, and the remedies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchopt.diff.zero_order.estimators import ESTIMATORS
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import is_batched_by_old_vmap, is_wrapped
from torchopt.tree import tree_leaves
from torchopt.tree_function import is_batched, is_differentiated

if TYPE_CHECKING:
    from torchopt.diff.zero_order.engine import ZeroOrder

__all__ = [
    "no_forward_mode",
    "no_third_derivative",
    "require_no_names",
    "require_one_cotangent",
    "require_plain",
    "require_second_derivative",
]


def require_one_cotangent(cotangent: Tensor) -> None:
    """Raise for a batch of cotangents."""
    # torch's batched backward passes use another kind of vmap.
    if is_batched_by_old_vmap(cotangent) or is_batched(cotangent):
        raise NotDifferentiableError(
            "zero-order estimation: expected one cotangent at a time, got a batch of them "
            "(is_grads_batched=True or vectorize=True). Use torch.func.jacrev, torch.func.vmap "
            "over torch.func.vjp, or a loop."
        )


def require_plain(tree: Any, what: str) -> None:
    """Raise for tensors of a transform: an estimate is computed from plain numbers."""
    inside = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and is_wrapped(x)]
    remedy = "differentiate the decorated function: torch.func.vmap(torch.func.grad(engine(fn)))."
    if any(map(is_batched, inside)):
        raise RuntimeError(
            f"{what}: estimates, losses and centers are made of plain tensors, got arguments "
            f"inside of a vmap. Loop over the points, or {remedy}"
        )
    if any(map(is_differentiated, inside)):
        raise NotDifferentiableError(
            f"{what}: expected arguments without a derivative, got some that torch.func "
            "differentiates: the derivative of an estimate would silently be zero. Detach them, or "
            f"{remedy}"
        )


def require_no_names(names: Iterable[str]) -> None:
    """Raise if the function depends on tensors whose gradient the estimate would omit."""
    found = list(dict.fromkeys(names))
    if not found:
        return
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    raise NotDifferentiableError(
        f"zero-order estimation: the function depends on {shown}: not among the arguments at "
        "argnums, but a gradient is required there; it would silently be zero. Pass them as "
        "arguments and name these in argnums, or detach them."
    )


def require_second_derivative(engine: ZeroOrder) -> None:
    """Raise if Stein's identity gives no second derivative."""
    if engine.estimator.curvature is None or not engine.directions.standard_normal:
        known = ", ".join(name for name, e in ESTIMATORS.items() if e.curvature is not None)
        raise NotDifferentiableError(
            f"zero-order estimation: a second derivative is defined for one of the methods {known} "
            "and standard normal directions (torch.distributions.Normal(0.0, 1.0), torch.randn, "
            f"Gaussian(), Orthogonal(), Sobol()), got {engine.estimator.name} and "
            f"{engine.directions!r}. Choose among these, or drop create_graph=True."
        )


def no_forward_mode(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Raise, because an estimate has no forward mode."""
    raise NotDifferentiableError(
        "zero-order estimation: expected a reverse-mode derivative, got a request for a "
        "forward-mode one. Use reverse mode: torch.func.vjp for torch.func.jvp, "
        "torch.func.jacrev(torch.func.jacrev(f)) for torch.func.hessian(f)."
    )


def no_third_derivative(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Raise, because an estimate has only a first and a second derivative."""
    raise NotDifferentiableError(
        "zero-order estimation: expected a first or second derivative, got a request for a third "
        "one. Estimate a derivative of the outer function instead."
    )
