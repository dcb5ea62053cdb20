# SPDX-License-Identifier: Apache-2.0
"""Adafactor's step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.kernels.reference.root import root
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import for_each_distinct, increment, zero_counts
from torchopt.transform.validate import check_at_least_zero

__all__ = ["ScaleByFactoredRmsState", "scale_by_factored_rms"]


class ScaleByFactoredRmsState(NamedTuple):
    """`rows`, `columns`: means of the squared gradient; of a vector, `rows` is the square."""

    rows: Any
    columns: Any
    count: Any


@dataclass(frozen=True)
class ScaleByFactoredRms(LeafRule):
    """u = alpha_k g / sqrt(row mean times column mean), clipped."""

    lr: float | Tensor
    beta2_decay: float
    eps1: float | None
    eps2: float
    d: float
    leaf_fields: ClassVar[tuple[str, ...]] = ("rows", "columns", "count")
    overwritten_fields: ClassVar[tuple[str, ...]] = ("rows", "columns")
    reads_params: ClassVar[bool] = True

    def init_leaves(self, params: list[Tensor]) -> ScaleByFactoredRmsState:
        """Return means and counts of zero."""
        return ScaleByFactoredRmsState(
            rows=[torch.zeros_like(p[..., :1] if p.ndim > 1 else p) for p in params],
            columns=[
                torch.zeros_like(p[..., :1, :]) if p.ndim > 1 else p.new_zeros(()) for p in params
            ],
            count=zero_counts(params),
        )

    def update_leaves(
        self, grads: list[Tensor], state: Any, params: list[Tensor], *, inplace: bool
    ) -> tuple[list[Tensor], Any]:
        """Return the steps, with a minus still to come, and the new means."""
        counts = increment(state.count)
        columns: list[Tensor] = []
        rows: list[Tensor] = []
        updates = []
        scalars = for_each_distinct(self._scalars, counts, [g.dtype for g in grads])
        for g, p, row, column, (weight, rho) in zip(
            grads, params, state.rows, state.columns, scalars
        ):
            eps1 = torch.finfo(g.dtype).eps if self.eps1 is None else self.eps1
            square = g * g
            if g.ndim > 1:
                row = row + weight * (square.mean(dim=-1, keepdim=True) - row)
                column = column + weight * (square.mean(dim=-2, keepdim=True) - column)
                variance = row * column / row.mean(dim=-2, keepdim=True).clamp(min=eps1)
            else:
                row = row + weight * (square - row)
                variance = row
            rows.append(row)
            columns.append(column)
            u = g * variance.clamp(min=eps1 * eps1).rsqrt()
            size = max(g.numel(), 1) ** 0.5
            alpha = (root((p * p).sum()) / size).clamp(min=self.eps2) * rho
            updates.append(u * (alpha / (root((u * u).sum()) / (size * self.d)).clamp(min=1.0)))
        return updates, ScaleByFactoredRmsState(rows=rows, columns=columns, count=counts)

    def _scalars(self, count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weight of a new square, and the relative step size."""
        k = count.to(torch.float64)
        lr = torch.as_tensor(self.lr, dtype=torch.float64, device=k.device)
        weight = torch.pow(k, self.beta2_decay)
        return weight.to(dtype), torch.minimum(lr, 1 / k.sqrt()).to(dtype)


@transformation
def scale_by_factored_rms(
    lr: float | Tensor = 1e-2,
    beta2_decay: float = -0.8,
    eps1: float | None = None,
    eps2: float = 1e-3,
    d: float = 1.0,
) -> LeafRule:
    r"""Return the transformation to Adafactor's step.

    .. math::
        w = k^{\beta}, \quad R' = R + w (\mathrm{mean}_{-1} g^2 - R), \quad
        C' = C + w (\mathrm{mean}_{-2} g^2 - C), \quad
        V = \frac{R' C'}{\mathrm{mean}_{-2} R'}, \quad
        u = \alpha \frac{g / \sqrt V}{\max(1, \mathrm{rms}(g / \sqrt V) / d)}

    with alpha = max(eps2, rms(p)) min(lr, 1 / sqrt(k)). A vector keeps the mean of g^2 itself. The
    state of a matrix is one row and one column. The step size is part of u.

    Args:
        lr: The largest relative step size, >= 0.
        beta2_decay: beta, <= 0.
        eps1: Smallest root of the second moment; None for the spacing of the dtype at one.
        eps2: Smallest root mean square that a parameter counts for, >= 0.
        d: Largest root mean square of a direction, > 0.

    Raises:
        ValueError: A hyper-parameter out of range.
        AssertionError: From `update`, when it is called without `params`.

    References:
        N. Shazeer, M. Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
        https://arxiv.org/abs/1804.04235, Algorithms 4 and 5.
    """
    check_at_least_zero(lr, "learning rate")
    check_at_least_zero(eps2, "epsilon value")
    if beta2_decay > 0:
        raise ValueError(f"Invalid beta2_decay value: {beta2_decay}")
    if not d > 0:
        raise ValueError(f"Invalid d value: {d}")
    return ScaleByFactoredRms(lr, beta2_decay, eps1, eps2, d)
