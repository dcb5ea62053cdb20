# SPDX-License-Identifier: Apache-2.0
"""PSGD with Kronecker factors: a preconditioner that is fitted by gradient descent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import DECOUPLED, documented
from torchopt.kernels.reference.formulas import bias_correction, moving_average
from torchopt.kernels.stacks import in_rows
from torchopt.optimizers.stages import optimizer
from torchopt.params.sharded import require_whole
from torchopt.transform.base import LeafRule, transformation_of
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.validate import Hyper, at_least_zero, fraction, positive, within
from torchopt.typing import ScalarOrSchedule

__all__ = ["ScaleByPsgdState", "psgd", "scale_by_psgd"]


class ScaleByPsgdState(NamedTuple):
    """`mu`: average of the gradient; `factors`: for each leaf one float64 vector with its two
    factors, each a triangular matrix row by row or a diagonal; `count`: steps of each leaf.
    """

    mu: Any
    factors: Any
    count: Any

    @staticmethod
    def exact_fields() -> tuple[str, ...]:
        """Return the fields that `in_8_bits` leaves as they are."""
        return ("factors",)


@dataclass(frozen=True)
class ScaleByPsgd(LeafRule):
    """u = Q'Q mu_hat, with Q the Kronecker product of the factors."""

    momentum: Hyper = fraction("momentum value", 0.9)
    precondition_lr: Hyper = within("0 < number < 1", "precondition_lr value", 0.1)
    initial_scale: Hyper = positive("initial_scale value", 1.0)
    max_size: int = at_least_zero("max_size value", 1024)
    seed: int = within("an integer >= 0", "seed value", 0)
    leaf_fields: ClassVar[tuple[str, ...]] = ("mu", "factors", "count")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("mu", "factors")
    complex_numbers: ClassVar[str] = "refused"

    def _is_diagonal(self, shape: Sequence[int], n: int) -> bool:
        return len(shape) < 2 or n > self.max_size

    def _unpacked(self, packed: Tensor, shape: Sequence[int]) -> list[Tensor]:
        diagonal = [self._is_diagonal(shape, n) for n in _sides(shape)]
        sizes = [n if d else n * n for n, d in zip(_sides(shape), diagonal)]
        parts = packed.split(sizes, dim=1)
        return [
            part if d else part.reshape(len(part), n, n)
            for part, n, d in zip(parts, _sides(shape), diagonal)
        ]

    def init_leaves(self, params: list[Tensor]) -> ScaleByPsgdState:
        """Return averages of zero, and factors that are multiples of the identity."""
        require_whole(params, "psgd", "give whole tensors, or use adam or muon")
        factors = []
        for p in params:
            scale = torch.as_tensor(self.initial_scale, dtype=torch.float64, device=p.device)
            parts = []
            for n in _sides(p.shape):
                one = torch.ones(n, dtype=torch.float64, device=p.device)
                scaled = one * scale**0.5
                full = not self._is_diagonal(p.shape, n)
                parts.append(torch.diag(scaled).reshape(-1) if full else scaled)
            factors.append(torch.cat(parts))
        return ScaleByPsgdState(
            mu=[torch.zeros_like(p, requires_grad=False) for p in params],
            factors=factors,
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        counts = increment(state.count)
        updates, mu, factors = in_rows(
            lambda i, g, mu, factors: self._stepped(g, mu, factors, counts[i]),
            (grads, state.mu, state.factors),
            [id(count) for count in counts],
        )
        return updates, ScaleByPsgdState(mu=mu, factors=factors, count=counts)

    def _stepped(
        self, g: Tensor, mu: Tensor, factors: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return directions, averages and factors of leaves of one shape, one in each row."""
        shape = g.shape[1:]
        mu = moving_average(mu, g, self.momentum)
        if not g.numel():
            return g, mu, factors
        first, second = self._unpacked(factors, shape)
        x = g.to(torch.float64).reshape(len(g), *_sides(shape))
        probe = _probe(x[0].numel(), count, self.seed).reshape(x.shape[1:]).expand(x.shape)
        whitened = _times(_times(x, first, left=True), second, left=False)
        spread = _solved(_solved(probe, first, left=True), second, left=False)
        first, second = (
            self._fitted(q, whitened, spread, left=left)
            for q, left in ((first, True), (second, False))
        )
        ahead = (mu / bias_correction(self.momentum, count, mu.dtype)).to(torch.float64)
        u = ahead.reshape(x.shape)
        for q, left in ((first, True), (second, False)):
            u = _times(_times(u, q, left=left), q if q.ndim == 2 else q.mT, left=left)
        packed = torch.cat([first.flatten(1), second.flatten(1)], dim=1)
        return u.reshape(g.shape).to(g.dtype), mu, packed

    def _fitted(self, q: Tensor, whitened: Tensor, spread: Tensor, *, left: bool) -> Tensor:
        """Return a factor after one step along its relative gradient."""
        a, b = (whitened, spread) if left else (whitened.mT, spread.mT)
        if q.ndim == 2:
            slope = (a * a).sum(dim=2) - (b * b).sum(dim=2)
            largest = slope.abs().amax(dim=1, keepdim=True)
        else:
            slope = (a @ a.mT - b @ b.mT).triu()
            largest = slope.abs().amax(dim=(1, 2), keepdim=True)
        step = self.precondition_lr / torch.where(largest > 0, largest, 1.0)
        return q - step * (slope * q if q.ndim == 2 else slope @ q)


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return the numbers of rows and columns of the matrix that represents a tensor."""
    columns = 1
    for n in shape[1:]:
        columns *= n
    return (shape[0] if shape else 1), columns


def _times(x: Tensor, q: Tensor, *, left: bool) -> Tensor:
    """Return q x, or x q', for a matrix or a diagonal."""
    if q.ndim == 2:
        return x * (q.unsqueeze(2) if left else q.unsqueeze(1))
    return q @ x if left else x @ q.mT


def _solved(x: Tensor, q: Tensor, *, left: bool) -> Tensor:
    """Return the inverse transpose of q times x, or x times the inverse of q."""
    if q.ndim == 2:
        return x / (q.unsqueeze(2) if left else q.unsqueeze(1))
    solved: Tensor = (
        torch.linalg.solve_triangular(q.mT, x, upper=False)
        if left
        else torch.linalg.solve_triangular(q, x, upper=True, left=False)
    )
    return solved


def _probe(size: int, count: Tensor, seed: int) -> Tensor:
    """Return `size` numbers 1 and -1, the bits of a hash of seed, count and index."""
    x = torch.arange(size, dtype=torch.int64, device=count.device)
    x = x + (count + seed * 0x10001) * 0x1F123BB5
    for factor in (0x45D9F3B, 0x45D9F3B, 0x2C1B3C6D):  # 32 bits: no product overflows
        x = ((x ^ (x >> 16)) & 0xFFFFFFFF) * factor & 0xFFFFFFFF
    return (1 - 2 * ((x >> 15) & 1)).to(torch.float64)


@transformation_of(ScaleByPsgd)
def scale_by_psgd() -> None:
    r"""Return the transformation that computes the direction of PSGD with Kronecker factors.

    With upper triangular Q and R, the gradient G, and a probe V of random signs,

    .. math::
        A = Q G R^\top, \quad B = Q^{-\top} V R^{-1}, \quad
        \nabla_Q = \mathrm{triu}(A A^\top - B B^\top), \quad
        \nabla_R = \mathrm{triu}(A^\top A - B^\top B)

    .. math::
        Q' = Q - \frac{\eta}{\max|\nabla_Q|} \nabla_Q Q, \qquad
        R' = R - \frac{\eta}{\max|\nabla_R|} \nabla_R R, \qquad
        u = Q'^\top Q' \hat\mu R'^\top R'

    which whitens: P = Q'Q tends to the inverse root of the second moment of the gradient. A tensor
    of more dimensions is taken as the matrix of its first dimension; vectors, and dimensions longer
    than `max_size`, have diagonal factors. The arithmetic is in float64.

    Random signs have the second moment that the paper requires of its normal probes. They are a
    hash of the seed, the count and the index of an element, so that a step depends on the state
    alone and can be repeated; entries of a vmap share their probes. The derivative is exact for
    constant probes. It includes that of the largest element, a subgradient where several are equal.

    Args:
        momentum: Decay of the average mu, in [0, 1); its bias is corrected.
        precondition_lr: eta, the relative step of the factors, in (0, 1).
        initial_scale: Initial factor of the gradient, > 0.
        max_size: Dimensions longer than this have diagonal factors.
        seed: Seed of the probes, >= 0.

    References:
        X.-L. Li, Preconditioner on Matrix Lie Group for SGD, 2018,
        https://arxiv.org/abs/1809.10232, section 4.

        O. Pooladzandi, X.-L. Li, Curvature-Informed SGD via General Purpose Lie-Group
        Preconditioners, 2024, https://arxiv.org/abs/2402.04553.
    """


@documented(scale_by_psgd, weight_decay=DECOUPLED)
def psgd(
    lr: ScalarOrSchedule = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    precondition_lr: float = 0.1,
    initial_scale: float = 1.0,
    max_size: int = 1024,
    seed: int = 0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return PSGD with Kronecker factors.

    Args:
        momentum: Decay of the average of the gradient, in [0, 1).
        precondition_lr: Relative step of the factors, in (0, 1).
    """
    direction = ScaleByPsgd(momentum, precondition_lr, initial_scale, max_size, seed)
    return optimizer(
        direction, lr=lr, decoupled_weight_decay=weight_decay, maximize=maximize, name="psgd"
    )
