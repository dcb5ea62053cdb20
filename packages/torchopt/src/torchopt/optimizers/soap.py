# SPDX-License-Identifier: Apache-2.0
"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import bias_correction, divide_by_root, moving_average
from torchopt.kernels.stacks import in_rows
from torchopt.optimizers.stages import optimizer
from torchopt.params.sharded import require_whole
from torchopt.transform.base import LeafRule, transformation_of
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.validate import Hyper, at_least_one, at_least_zero, fraction, unpacked
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleBySoapState", "scale_by_soap", "soap"]

_SHIFT = 1e-6


class ScaleBySoapState(NamedTuple):
    """`mu`: average of the gradient; `nu`: average of its square in the eigenbasis; `statistics`,
    `bases`: for each leaf one vector with the matrices of its dimensions, row by row; `t`: number
    of the next step of each leaf, from 1; `count`: number of its steps, 0-dim tensors.
    """

    mu: Any
    nu: Any
    statistics: Any
    bases: Any
    t: Any
    count: Any

    @staticmethod
    def exact_fields() -> tuple[str, ...]:
        """Return the fields that `in_8_bits` leaves as they are."""
        return ("statistics", "bases")


@dataclass(frozen=True)
class ScaleBySoap(LeafRule):
    """u = Adam's direction for the gradient in the eigenbasis, transformed back."""

    b1: Hyper = fraction("beta parameter at index 0", 0.95)
    b2: Hyper = fraction("beta parameter at index 1", 0.95)
    eps: Hyper = at_least_zero("epsilon value", 1e-8)
    shampoo_beta: Hyper = fraction("shampoo_beta value", 0.95)
    update_every: int = at_least_one("update_every value", 10)
    max_size: int = at_least_zero("max_size value", 1024)
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "nu", "statistics", "bases", "t", "count")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "nu", "statistics", "bases")
    complex_numbers: ClassVar[str] = "refused"

    def _turned(self, shape: Sequence[int]) -> list[tuple[int, int]]:
        """Return the dimensions with a matrix, and their sizes; a vector has none."""
        if len(shape) < 2:
            return []
        return [(i, n) for i, n in enumerate(shape) if n <= self.max_size]

    def _unpacked(self, packed: Tensor, shape: Sequence[int]) -> list[Tensor]:
        turned = self._turned(shape)
        parts = packed.split([n * n for _, n in turned], dim=1)
        return [part.reshape(len(part), n, n) for (_, n), part in zip(turned, parts)]

    def _dtype(self, p: Tensor) -> torch.dtype:
        return torch.float64 if self._turned(p.shape) else p.dtype

    def init_leaves(self, params: list[Tensor]) -> ScaleBySoapState:
        """Return moments and statistics of zero, and bases of unit vectors."""
        require_whole(params, "soap", "give whole tensors, or use adam or muon")
        shapes = [[n for _, n in self._turned(p.shape)] for p in params]
        return ScaleBySoapState(
            mu=[torch.zeros_like(p, dtype=self._dtype(p), requires_grad=False) for p in params],
            nu=[torch.zeros_like(p, dtype=self._dtype(p), requires_grad=False) for p in params],
            statistics=[
                p.detach().new_zeros(sum(n * n for n in s), dtype=torch.float64)
                for p, s in zip(params, shapes)
            ],
            bases=[
                torch.cat(
                    [p.detach().new_zeros(0, dtype=torch.float64)]
                    + [torch.eye(n, dtype=torch.float64, device=p.device).flatten() for n in s]
                )
                for p, s in zip(params, shapes)
            ],
            t=[1] * len(params),
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        counts = increment(state.count)
        # The first step needs a basis at once; later steps use that of the steps before.
        keys = [
            (t == 1, (t - 1) % self.update_every == 0, id(count))
            for t, count in zip(state.t, counts)
        ]

        def stepped(i: int, *stacked: Tensor) -> tuple[Tensor, ...]:
            dtype, (first, refresh, _) = self._dtype(grads[i]), keys[i]
            return self._stepped(tuple(x.to(dtype) for x in stacked), counts[i], first, refresh)

        roles = (grads, state.mu, state.nu, state.statistics, state.bases)
        updates, mu, nu, statistics, bases = in_rows(stepped, roles, keys)
        t = [t + 1 for t in state.t]
        return updates, ScaleBySoapState(mu, nu, statistics, bases, t, counts)

    def _stepped(
        self, stacked: tuple[Tensor, ...], count: Tensor, first: bool, refresh: bool
    ) -> tuple[Tensor, ...]:
        """Return directions and states of leaves of one shape, one in each row."""
        g, mu, nu, statistics, bases = stacked
        shape = g.shape[1:]
        turned = [i + 1 for i, _ in self._turned(shape)]
        old, moved = self._unpacked(statistics, shape), []
        for i, s in zip(turned, old if g.numel() else ()):
            rows = g.movedim(i, 1).flatten(2)
            moved.append(moving_average(s, rows @ rows.mT, self.shampoo_beta))
        basis = self._unpacked(bases, shape) if moved else []
        following = [_turned_on(s, q) for s, q in zip(moved, basis)] if refresh else basis
        if first:
            basis = following
        mu = moving_average(mu, g, self.b1)
        there = _along(g, turned, [q.mT for q in basis])
        nu = moving_average(nu, there * there, self.b2)
        direction = divide_by_root(
            _along(mu, turned, [q.mT for q in basis]) / bias_correction(self.b1, count, g.dtype),
            nu / bias_correction(self.b2, count, g.dtype),
            self.eps,
        )
        packed = [
            torch.cat([x.flatten(1) for x in parts], dim=1) if parts else old
            for parts, old in ((moved, statistics), (following, bases))
        ]
        return _along(direction, turned, basis), mu, nu, *packed


def _turned_on(s: Tensor, q: Tensor) -> Tensor:
    """Return the orthogonal basis after one power iteration from `q`, for symmetric `s`."""
    n = s.shape[-1]
    size = s.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None] / n
    size = torch.where(size > 0, size, 1.0)
    # A shift changes no eigenvector, and keeps the product from being singular.
    moved = (s / size) @ q + _SHIFT * q
    basis: Tensor = torch.linalg.qr(moved).Q
    return basis


def _along(x: Tensor, dimensions: Sequence[int], matrices: Sequence[Tensor]) -> Tensor:
    """Multiply each row of `x` by those of `matrices` along their dimensions."""
    for i, m in zip(dimensions, matrices):
        rows = x.movedim(i, 1)
        x = (m @ rows.flatten(2)).reshape(rows.shape).movedim(1, i)
    return x


@transformation_of(ScaleBySoap)
def scale_by_soap() -> None:
    r"""Return the transformation that computes SOAP's direction.

    For a matrix, with orthogonal Q and P,

    .. math::
        M' = b_1 M + (1 - b_1) G, \quad V' = b_2 V + (1 - b_2) (Q^T G P)^{\circ 2}, \quad
        U = Q \frac{Q^T M' P / (1 - b_1^k)}{\sqrt{V' / (1 - b_2^k)} + \epsilon} P^T

    .. math::
        L' = \beta L + (1 - \beta) G G^T, \quad R' = \beta R + (1 - \beta) G^T G, \quad
        Q' = \mathrm{qr}(L' Q), \quad P' = \mathrm{qr}(R' P)

    Tensors of more dimensions have a basis for each of them. Vectors and 0-dim tensors have none,
    and take Adam's step. Deviations from the paper: (1) The first bases come from the first
    gradient by the same power iteration, started from unit vectors, and not from an
    eigendecomposition, which has no derivative where eigenvalues coincide. The authors' code takes
    no step with that gradient; this one does. (2) The matrix of the power iteration is
    L / mean(diag L) + 1e-6 I, which has the same eigenvectors and is not singular. (3) The
    columns of a basis are not sorted, which only permutes them. States and arithmetic of a tensor
    with bases are in float64, whatever its dtype: along an eigenvector without gradients, float32
    leaves rounding noise, which Adam would divide by its own size.

    The derivative is that of these steps, exact to any order, also through the bases, because the
    QR decomposition of a nonsingular matrix is differentiable. The condition number of that matrix
    is at most 1e6 n.

    Args:
        shampoo_beta: beta, the decay of the preconditioners, in [0, 1).
        update_every: Number of steps between power iterations, >= 1.
        max_size: Dimensions longer than this have no basis.

    References:
        N. Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, 2024,
        https://arxiv.org/abs/2409.11321, Algorithms 3 and 4.
    """


@documented(scale_by_soap, weight_decay=DECOUPLED)
def soap(
    lr: ScalarOrSchedule = 3e-3,
    betas: tuple[float, float] = (0.95, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    shampoo_beta: float = 0.95,
    update_every: int = 10,
    max_size: int = 1024,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return SOAP.

    Args:
        shampoo_beta: Decay of the preconditioners, in [0, 1).
        update_every: Number of steps between computations of the eigenbases, >= 1.
    """
    b1, b2 = unpacked(betas, "betas", (0.95, 0.95))
    direction = ScaleBySoap(b1, b2, eps, shampoo_beta, update_every, max_size)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="soap"
    )
