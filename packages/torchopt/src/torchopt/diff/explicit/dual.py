# SPDX-License-Identifier: Apache-2.0
"""Gradients in forward over reverse mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.diff.closure import graph_of
from torchopt.errors import NotDifferentiableError
from torchopt.tree import is_smooth

__all__ = ["dual_gradient", "forward_mode_explained", "tangent_of"]

# Backward functions of torch that read what their forward one kept and has no tangent, such as the
# factors of a matrix, unless the backward pass makes a graph.
_WITH_GRAPH = {
    "CumprodBackward0",
    "LinalgDetBackward0",
    "LinalgSlogdetBackward0",
    "LinalgSolveExBackward0",
}
_REFUSALS = ("forward AD", "forward mode AD", "jvp function", "_efficientzerotensor")


def dual_gradient(value: Tensor, at: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the gradient of a sum, with the tangents that it has in forward mode."""
    nodes, _ = graph_of([value])
    graph = not _WITH_GRAPH.isdisjoint(node.name() for node in nodes)
    return torch.autograd.grad(value.sum(), at, create_graph=graph, allow_unused=True)


@contextlib.contextmanager
def forward_mode_explained() -> Iterator[None]:
    """Say in torch's stead that an operation has no forward mode.

    Raises:
        NotDifferentiableError: torch refused one.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        told = str(error).partition("\n")[0][:120]
        if isinstance(error, NotDifferentiableError) or not any(x in told for x in _REFUSALS):
            raise
        raise NotDifferentiableError(
            'inner_loop: derivative="mixed" or "forward": expected a loss whose operations have '
            f'a forward mode, got one that torch refuses ({told}); use derivative="reverse".'
        ) from error


def tangent_of(x: Any) -> Any:
    """Return the tangent of a leaf; None where it has none."""
    if not is_smooth(x):
        return None
    tangent = forward_ad.unpack_dual(x).tangent
    return None if tangent is None else tangent.detach()
