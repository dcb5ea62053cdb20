# SPDX-License-Identifier: Apache-2.0
"""Gradients in forward over reverse mode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.diff.closure import graph_of
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import any_autocast, dtypes_of_node, is_traced
from torchopt.tree import is_smooth

__all__ = ["Slope", "dual_gradient", "forward_mode_explained", "tangent_of"]

# Backward functions of torch that have a right forward mode only if the backward pass creates a
# graph. Otherwise they use a saved result without a tangent, such as the factors of a matrix, or
# run a kernel without forward mode.
_WITH_GRAPH = {
    "CumprodBackward0",
    "LinalgDetBackward0",
    "LinalgSlogdetBackward0",
    "LinalgSolveExBackward0",
    "MishBackward0",
    "NativeGroupNormBackward0",
    "SiluBackward0",
}
# Backward functions whose tangent is always wrong, and what to use instead.
_WRONG = {
    "CholeskyInverseBackward0": "torch.cholesky_solve of the identity",
    "TriangularSolveBackward0": "torch.linalg.solve_triangular",
}
SMALL = 2**20  # bytes of gradients that are kept until their tangents are known
ROUNDINGS = 1e3  # how many rounding errors may add up in a gradient
_PRECISE = {torch.float32, torch.float64, torch.complex64, torch.complex128}
_REFUSALS = ("forward AD", "forward mode AD", "jvp function", "_efficientzerotensor")


def dual_gradient(
    values: Sequence[Tensor],
    at: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    dense: bool = False,
) -> Sequence[Tensor | None]:
    """Return a vector-Jacobian product with its forward-mode tangents.

    Args:
        values: The outputs.
        at: The inputs.
        cotangents: A cotangent for each output; None for 0-dim outputs and ones.
        dense: Whether those ones have tangents of zeros. Then torch does not ask a function in
            Python for shapes, and keeps more zeros.

    Raises:
        NotDifferentiableError: The loss contains an operation, or the gradient of one, for which
            torch's forward mode is wrong.
    """
    names = {node.name() for node in graph_of(values)[0]}
    for name in names:
        if name in _WRONG:
            raise NotDifferentiableError(
                'inner_loop: derivative="mixed" or "forward": expected a loss whose gradient has a '
                f"forward mode, got {name}, whose tangent torch computes wrongly; use "
                f'{_WRONG[name]}, or derivative="reverse".'
            )
        if "Norm" in name and "BackwardBackward" in name:
            raise NotDifferentiableError(
                'inner_loop: derivative="mixed" or "forward": expected a loss without the gradient '
                f"of a normalisation in it, got {name}, in which torch's forward mode treats mean "
                'and variance as constants; use derivative="reverse".'
            )
    if cotangents is None and dense and not is_traced():
        cotangents = [forward_ad.make_dual(torch.ones_like(y), torch.zeros_like(y)) for y in values]
    graph = not _WITH_GRAPH.isdisjoint(names)
    return torch.autograd.grad(values, at, cotangents, create_graph=graph, allow_unused=True)


@contextlib.contextmanager
def forward_mode_explained() -> Iterator[None]:
    """Replace torch's error for an operation without forward mode by one with a remedy.

    Raises:
        NotDifferentiableError: torch refused an operation.
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


@dataclass(frozen=True)
class Slope:
    """The slope of a loss in the direction of tangents, by its gradient.

    Attributes:
        value: The slope.
        sizes: Returns the norms of gradients and tangents, multiplied and added up, and the norms
            of the tangents, added up.
        dtypes: Of the gradients.
    """

    value: float
    sizes: Callable[[], tuple[float, float]]
    dtypes: frozenset[torch.dtype]

    @staticmethod
    def of(grads: Sequence[Any], directions: Sequence[Tensor | None]) -> Slope | None:
        """Return the slope; None where rounding hides it, or where no numbers can be read."""
        pairs = [(g, d) for g, d in zip(grads, directions) if g is not None and d is not None]
        dtypes = frozenset(g.dtype for g, _ in pairs)
        if not pairs or not dtypes <= _PRECISE or is_traced() or any_autocast():
            return None
        slopes = [torch.vdot(g.reshape(-1), d.reshape(-1)).real.double() for g, d in pairs]
        value = float(torch.stack(slopes).sum())
        if sum(g.nbytes for g, _ in pairs) <= SMALL:
            return Slope(value, functools.partial(_sizes, pairs), dtypes)
        sizes = _sizes(pairs)  # later, the gradients would still take memory
        return Slope(value, lambda: sizes, dtypes)

    def require(
        self, value: Tensor, params: Sequence[Tensor], curved: Sequence[Tensor | None]
    ) -> None:
        """Raise unless the tangent of a loss is this slope.

        If a backward pass changes gradients, they are the derivative of no function, and their own
        derivative is not symmetric. This check also finds a tangent of something that is a constant
        in reverse mode. Near a minimum both slopes consist of rounding errors of terms that cancel;
        then a difference between them is allowed. So are the rounding errors of half precision
        inside the loss.

        Args:
            value: The loss with its tangent, 0-dim or `[tasks]`.
            params: The parameters that are differentiated.
            curved: The Hessian times the tangents, for each of `params`.
        """
        pushed = forward_ad.unpack_dual(value).tangent
        if pushed is None or value.dtype not in _PRECISE:
            return
        found = float(pushed.detach().sum())
        limits = [torch.finfo(dtype) for dtype in (value.dtype, *self.dtypes)]
        eps, tiny = max(x.eps for x in limits), max(x.tiny for x in limits)
        apart = abs(found - self.value)
        # The slope is not larger than the scale, which takes longer to compute.
        if apart <= max(eps ** (1 / 3) * abs(self.value), tiny / eps):
            return
        scale, noise = self.sizes()
        if apart <= eps ** (1 / 3) * scale:
            return
        both = [(x, c) for x, c in zip(params, curved) if c is not None]
        if both:
            noise += float(_norms([x for x, _ in both]).dot(_norms([c for _, c in both])))
        coarse = _eps_inside(value)
        if coarse > eps and apart <= 8 * coarse * scale:
            return
        if apart > ROUNDINGS * eps * noise:  # never for NaN
            raise NotDifferentiableError(
                'inner_loop: derivative="mixed": expected a loss whose backward pass is its '
                f"derivative, got one whose slope in a direction is {found:.3g} by forward mode "
                f"and {self.value:.3g} by its gradient; does an autograd.Function change the "
                'gradient? Use derivative="reverse", or "first_order".'
            )


def _eps_inside(value: Tensor) -> float:
    """Return the coarsest precision in a graph, such as that of a loss that uses autocast."""
    dtypes = {dtype for node in graph_of([value])[0] for dtype in dtypes_of_node(node)}
    found = (torch.finfo(x).eps for x in dtypes if x.is_floating_point or x.is_complex)
    return max(found, default=0.0)


def _sizes(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    norms = _norms([g for g, _ in pairs]), _norms([d for _, d in pairs])
    scale, reach = torch.stack([norms[0].dot(norms[1]), norms[1].sum()]).tolist()
    return scale, reach


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    # In float32 the squares of small cotangents underflow.
    kinds = (torch.complex128 if x.is_complex() else torch.float64 for x in tensors)
    found = [torch.linalg.vector_norm(x.detach(), dtype=kind) for x, kind in zip(tensors, kinds)]
    return torch.stack(found)


def tangent_of(x: Any) -> Any:
    """Return the tangent of a leaf; None where it has none."""
    if not is_smooth(x):
        return None
    tangent = forward_ad.unpack_dual(x).tangent
    return None if tangent is None else tangent.detach()
