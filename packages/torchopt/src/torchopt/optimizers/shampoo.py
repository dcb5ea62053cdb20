# SPDX-License-Identifier: Apache-2.0
"""Shampoo: gradients times inverse roots of their second moments along each dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.reference.inverse_root import inverse_root
from torchopt.kernels.stacks import in_rows
from torchopt.optimizers.sgd import trace
from torchopt.optimizers.stages import optimizer
from torchopt.params.sharded import require_whole
from torchopt.transform.base import LeafRule, transformation_of
from torchopt.transform.validate import Hyper, at_least_one, at_least_zero, fraction, positive
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByShampooState", "scale_by_shampoo", "shampoo"]

_RIDGE = torch.finfo(torch.float64).eps


class ScaleByShampooState(NamedTuple):
    """`statistics`, `roots`: for each leaf, one float64 vector with the matrices of its dimensions
    one after the other, each row by row or as a diagonal. `t`: number of the next step of each
    leaf, from 1.
    """

    statistics: Any
    roots: Any
    t: Any

    @staticmethod
    def exact_fields() -> tuple[str, ...]:
        """Return the fields that `in_8_bits` leaves as they are."""
        return ("statistics", "roots")


@dataclass(frozen=True)
class ScaleByShampoo(LeafRule):
    """u = g times the inverse root of its second moment along each dimension."""

    eps: Hyper = positive("epsilon value", 1e-4)
    decay: Hyper = fraction("decay value", 1.0, closed=True)
    update_every: int = at_least_one("update_every value", 1)
    max_size: int = at_least_zero("max_size value", 1024)
    root_steps: int = at_least_one("root_steps value", 50)
    leaf_fields: ClassVar[tuple[str, ...]] = ("statistics", "roots", "t")
    compressed: ClassVar[bool] = True
    complex_numbers: ClassVar[str] = "refused"
    overwritten_fields: ClassVar[tuple[str, ...]] = ("statistics", "roots")

    def _diagonal(self, size: int) -> bool:
        return size > self.max_size

    def _unpacked(self, packed: Tensor, shape: Sequence[int]) -> list[Tensor]:
        sizes = [n if self._diagonal(n) else n * n for n in shape]
        return [
            part if self._diagonal(n) else part.reshape(-1, n, n)
            for n, part in zip(shape, packed.split(sizes, dim=1))
        ]

    def _scaled_identities(self, p: Tensor, value: float | Tensor) -> Tensor:
        parts = []
        for n in _shape(p):
            one = torch.ones(n, dtype=torch.float64, device=p.device)
            scaled = one * (value.to(one) if isinstance(value, Tensor) else value)
            parts.append(scaled if self._diagonal(n) else torch.diag(scaled).reshape(-1))
        return torch.cat(parts)

    def init_leaves(self, params: list[Tensor]) -> ScaleByShampooState:
        """Return statistics of eps times the identity."""
        require_whole(params, "shampoo", "give whole tensors, or use adam or muon")
        params = [p.detach() for p in params]
        return ScaleByShampooState(
            statistics=[self._scaled_identities(p, self.eps) for p in params],
            roots=[
                self._scaled_identities(p, self.eps ** (-1 / (2 * len(_shape(p))))) for p in params
            ],
            t=[1] * len(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        # Each leaf counts its own steps: it might have no gradient in just those steps in which the
        # other leaves compute their roots.
        refresh = [(t - 1) % self.update_every == 0 for t in state.t]
        updates, statistics, roots = in_rows(
            lambda i, g, old, roots: self._stepped(g.double(), old.double(), roots, refresh[i]),
            (grads, state.statistics, state.roots),
            refresh,
        )
        return updates, ScaleByShampooState(statistics, roots, [t + 1 for t in state.t])

    def _stepped(
        self, g: Tensor, old: Tensor, roots: Tensor, refresh: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return directions, statistics and roots of leaves of one shape, one in each row.

        They are in float64: roots are large in directions without gradients, and would amplify
        rounding errors there.
        """
        if not g.numel():
            return g, old, roots
        count, *sizes = g.shape
        shape = sizes or [1]
        x = g.reshape(count, *shape)
        new = self._moved(x, self._unpacked(old, shape))
        if refresh:
            parts = self._unpacked(new, shape)
            roots = torch.cat([self._root(s, len(shape)).reshape(count, -1) for s in parts], dim=1)
        for dimension, r in enumerate(self._unpacked(roots, shape)):
            x = _along(x, r, dimension + 1)
        return x.reshape(g.shape), new, roots

    def _moved(self, g: Tensor, old: Sequence[Tensor]) -> Tensor:
        parts = []
        for dimension, s in enumerate(old, 1):
            rows = g.movedim(dimension, 1).flatten(2) if g.ndim > 2 else g.unsqueeze(2)
            square = (rows * rows).sum(dim=2) if s.ndim == 2 else rows @ rows.mT
            if isinstance(self.decay, Tensor):
                fresh = torch.where(self.decay == 1, torch.ones_like(self.decay), 1 - self.decay)
                s, square = s * self.decay, square * fresh
            elif self.decay != 1.0:
                s, square = s * self.decay, square * (1 - self.decay)
            parts.append((s + square).flatten(1))
        return torch.cat(parts, dim=1)

    def _root(self, s: Tensor, order: int) -> Tensor:
        if s.ndim == 2:
            return s ** (-1 / (2 * order))
        # Rounding may leave a negative eigenvalue, which has no root: hence the ridge.
        trace = s.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None]
        ridge = _RIDGE * s.shape[-1] * trace
        identity = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
        return inverse_root(s + ridge * identity, 2 * order, self.root_steps)


def _shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape; that of a 0-dim tensor is (1,)."""
    return tuple(p.shape) or (1,)


def _along(x: Tensor, r: Tensor, dimension: int) -> Tensor:
    """Multiply each row of `x` by that of `r`, a matrix or diagonal, along a dimension."""
    moved = x.movedim(dimension, -1)
    if r.ndim == 2:
        r = r.reshape(len(r), *(1,) * (x.ndim - 2), -1)
        return (moved * r).movedim(-1, dimension)
    if x.ndim == 2:
        return (moved.unsqueeze(1) @ r).squeeze(1)
    return (moved.flatten(1, -2) @ r).reshape(moved.shape).movedim(-1, dimension)


@transformation_of(ScaleByShampoo)
def scale_by_shampoo() -> None:
    r"""Return the transformation that computes Shampoo's direction.

    For a matrix,

    .. math::
        L' = L + G G^\top, \qquad R' = R + G^\top G, \qquad U = L'^{-1/4} G R'^{-1/4}

    from :math:`L = R = \epsilon I`. A tensor with k dimensions has one such matrix for each of
    them, and roots of order 2 k; a vector is preconditioned by the full matrix of AdaGrad.

    Before a root is taken, a ridge of 2.2e-16 times size and trace is added, because rounding may
    make an eigenvalue negative. The direction is differentiable to any order, even where
    eigenvalues coincide. The state and the roots are in float64, whatever the dtype of the
    parameters: squares of float32 gradients do not fit into float32, and preconditioners of few
    steps are nearly singular. A dimension of size n takes 2 n^2 float64 numbers, and an
    eigendecomposition whenever its root is computed.

    Args:
        eps: Initial value of the diagonals, > 0.
        decay: 1 for sums; smaller for moving averages, L' = decay L + (1 - decay) G G^T. At 1,
            where the formula jumps, the derivative is that of the product decay L.
        update_every: Number of steps between computations of the roots, >= 1.
        max_size: Dimensions longer than this have a diagonal instead of a matrix.
        root_steps: Number of iterations for a root where eigenvalues cannot be used: for
            derivatives of higher order and under torch.compile; >= 1.

    References:
        V. Gupta, T. Koren, Y. Singer, Shampoo: Preconditioned Stochastic Tensor Optimization, 2018,
        https://arxiv.org/abs/1802.09568, Algorithms 1 and 2.

    Example:
        >>> direction = scale_by_shampoo(eps=1e-12)
        >>> g = torch.tensor([[3.0, 0.0], [0.0, -5.0]], dtype=torch.float64)
        >>> direction.update(g, direction.init(g))[0]
        tensor([[ 1.0000, 0.0000],
                [ 0.0000, -1.0000]], dtype=torch.float64)
    """


@documented(scale_by_shampoo)
def shampoo(
    lr: ScalarOrSchedule = 1e-1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    eps: float = 1e-4,
    decay: float = 1.0,
    update_every: int = 1,
    max_size: int = 1024,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Shampoo.

    The update is -lr times the momentum of the direction of `torchopt.transform.scale_by_shampoo`.

    Args:
        momentum: Decay of the momentum of the directions, >= 0.
    """
    return optimizer(
        ScaleByShampoo(eps, decay, update_every, max_size),
        trace.rule(momentum),
        lr=lr,
        weight_decay=weight_decay,
        maximize=maximize,
        name="shampoo",
    )
