# SPDX-License-Identifier: Apache-2.0
"""Hooks on the gradients that flow through a gradient transformation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import has_tangent
from torchopt.transform.base import LeafRule, as_transformation

__all__ = ["nan_to_num_hook", "register_hook", "zero_nan_hook"]


def zero_nan_hook(g: Tensor) -> Tensor:
    """Return `g` with zeros for NaN (and the largest numbers for infinities).

    Example:
        >>> zero_nan_hook(torch.tensor([float("nan"), 1.0]))
        tensor([0., 1.])
    """
    return torch.nan_to_num(g, nan=0.0)


def nan_to_num_hook(
    nan: float = 0.0, posinf: float | None = None, neginf: float | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a hook that replaces NaN and infinities.

    Args:
        nan: The value for NaN.
        posinf: The value for infinity; None for the largest number of the dtype.
        neginf: The value for minus infinity; None for the smallest number of the dtype.

    Example:
        >>> import torch
        >>> nan_to_num_hook(nan=-1.0)(torch.tensor([float("nan"), 1.0]))
        tensor([-1.,  1.])
    """
    return functools.partial(torch.nan_to_num, nan=nan, posinf=posinf, neginf=neginf)


@dataclass(frozen=True)
class RegisterHook(LeafRule):
    """u = g, with a backward hook on g."""

    hook: Callable[[Tensor], Tensor | None]
    # The hook is registered on the gradient itself.
    widens: ClassVar[bool] = False
    complex_numbers: ClassVar[str] = "whole"

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Register the hook on every gradient that something can flow back to.

        Raises:
            NotDifferentiableError: A gradient has a tangent, which no hook sees.
        """
        for g in grads:
            if has_tangent(g):
                raise NotDifferentiableError(
                    "register_hook: expected a derivative in reverse mode, whose gradients hooks "
                    'see, got forward mode; use derivative="reverse", or jacrev.'
                )
            if g.requires_grad:
                g.register_hook(self.hook)
        return grads, state


def register_hook(hook: Callable[[Tensor], Tensor | None]) -> GradientTransformation:
    """Return the transformation that registers `hook` on the gradients and passes them through.

    The hook is called in the backward pass through a step, with the derivative of the outer loss
    with respect to the gradient. This needs gradients that are part of a graph
    (`create_graph=True`). Gradients without a graph, as under `torch.no_grad()` and in first-order
    steps, pass without a hook, because nothing flows back to them.

    Args:
        hook: A function of that derivative. It returns a replacement, or None to keep it.

    Raises:
        TypeError: `hook` is not a function.
        NotDifferentiableError: From `update`, in forward mode, which calls no hooks.

    Example:
        >>> import torch
        >>> g = torch.tensor(2.0, requires_grad=True)
        >>> hooked = register_hook(lambda derivative: 10 * derivative)
        >>> u, _ = hooked.update(g * 1.0, hooked.init(g))
        >>> torch.autograd.grad(3.0 * u, g)
        (tensor(30.),)
    """
    if not callable(hook):
        raise TypeError(
            f"register_hook(hook): expected a function of a derivative, got {type(hook).__name__}"
        )
    return as_transformation(RegisterHook(hook), already_flattened=False)
