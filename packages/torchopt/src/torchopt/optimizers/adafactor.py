# SPDX-License-Identifier: Apache-2.0
"""Adafactor: the second moment of a matrix is kept as a row and a column."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels import native
from torchopt.kernels.reference.formulas import in_double, root
from torchopt.kernels.stacks import in_rows
from torchopt.optimizers.stages import compose, flip_sign_and_add_weight_decay
from torchopt.transform.base import LeafRule, transformation_of
from torchopt.transform.counts import increment, zero_counts
from torchopt.transform.leaf_rule import put
from torchopt.transform.linear import AddDecayedWeights, Scale
from torchopt.transform.validate import (
    Hyper,
    are_numbers,
    at_least_zero,
    check,
    number,
    positive,
    unpacked,
    within,
)
from torchopt.tree_function import are_unfollowed

__all__ = ["ScaleByFactoredRmsState", "adafactor", "scale_by_factored_rms"]


class ScaleByFactoredRmsState(NamedTuple):
    """`rows`, `columns`: averages of the squared gradient; for a vector, `rows` is its average."""

    rows: Any
    columns: Any
    count: Any


@dataclass(frozen=True)
class ScaleByFactoredRms(LeafRule):
    """u = sign alpha_k g / sqrt(row mean times column mean), clipped."""

    lr: Hyper = at_least_zero("learning rate", 1e-2)
    beta2_decay: Hyper = within("a number <= 0", "beta2_decay value", -0.8)
    eps1: Hyper | None = number(None)
    eps2: Hyper = at_least_zero("epsilon value", 1e-3)
    d: Hyper = positive("d value", 1.0)
    sign: ClassVar[int] = 1
    leaf_fields: ClassVar[tuple[str, ...]] = ("rows", "columns", "count")
    compressed: ClassVar[bool] = True
    complex_numbers: ClassVar[str] = "refused"
    overwritten_fields: ClassVar[tuple[str, ...]] = ("rows", "columns")
    reads_params: ClassVar[bool] = True

    def init_leaves(self, params: list[Tensor]) -> ScaleByFactoredRmsState:
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
        counts = increment(state.count)
        roles = (grads, params, state.rows, state.columns)
        groups: dict[int, list[int]] = {}
        for i, count in enumerate(counts):
            groups.setdefault(id(count), []).append(i)
        if len(groups) == 1:
            found = self._together(*roles, counts[0], inplace=inplace)
        else:  # nothing is written yet, because a later group could raise
            found = [[None] * len(grads) for _ in range(3)]
            for indices in groups.values():
                g, p, row, column = ([role[i] for i in indices] for role in roles)
                own = self._together(g, p, row, column, counts[indices[0]])
                found = [put(role, indices, values) for role, values in zip(found, own)]
        updates, rows, columns = found
        return updates, ScaleByFactoredRmsState(rows, columns, counts)

    def _together(
        self,
        grads: list[Tensor],
        params: list[Tensor],
        rows: list[Tensor],
        columns: list[Tensor],
        count: Tensor,
        *,
        inplace: bool = False,
    ) -> Any:
        """Return steps, rows and columns of leaves that took the same number of steps."""
        roles = (grads, params, rows, columns)
        if self._has_numbers(count):
            eps1 = -1.0 if self.eps1 is None else self.eps1
            hypers = list(map(float, (*self._scalars(float(count)), eps1, self.eps2, self.d)))
            written = (rows, columns) if inplace else ()
            found = native.call("factored_rms", roles, hypers, inplace, written=written)
            if found is not None:
                return found
        scalars = self._scalars(count.to(torch.float64))
        return in_rows(
            lambda _, g, p, row, column: self._stepped(g, p, row, column, *scalars), roles
        )

    def _has_numbers(self, count: Tensor) -> bool:
        """Return whether count and hyper-parameters can be read as numbers."""
        hypers = (self.lr, self.beta2_decay, self.eps1, self.eps2, self.d)
        read = [count, *(h for h in hypers if isinstance(h, Tensor))]
        return are_unfollowed(read) and all(x.ndim == 0 and x.is_cpu for x in read)

    def _scalars(self, k: Any) -> tuple[Any, Any]:
        """Return the weight of a new square, and the relative step size with its sign."""
        lr, most = self.lr, k**-0.5
        if isinstance(k, Tensor):
            lr = torch.minimum(in_double(lr, k), most)
        else:
            lr = min(lr, most)
        return k**self.beta2_decay, self.sign * lr

    def _stepped(
        self, g: Tensor, p: Tensor, row: Tensor, column: Tensor, weight: Tensor, rho: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return steps, rows and columns of leaves of one shape, one in each row."""
        weight, rho = weight.to(g.dtype), rho.to(g.dtype)
        eps1 = torch.finfo(g.dtype).eps if self.eps1 is None else self.eps1
        square = g * g
        if g.ndim > 2:
            row = _moved(row, square.mean(dim=-1, keepdim=True), weight)
            column = _moved(column, square.mean(dim=-2, keepdim=True), weight)
            mean = row.mean(dim=-2, keepdim=True)
            mean = mean.clamp(max=torch.finfo(mean.dtype).max).clamp(min=eps1)
            variance = row / mean * column
        else:
            row = variance = _moved(row, square, weight)
        u = g * variance.clamp(min=eps1 * eps1).rsqrt()
        alpha = _rms(p).to(g.dtype).clamp(min=self.eps2) * rho
        return u * (alpha / (_rms(u) / self.d).clamp(min=1.0)), row, column


def _rms(x: Tensor) -> Tensor:
    """Return the root mean square of each row, with the number of dimensions of `x`."""
    size = math.prod(x.shape[1:])
    square = x * x
    total = square.sum(dim=tuple(range(1, x.ndim)), keepdim=True) if x.ndim > 1 else square
    mean: Tensor = root(total / max(size, 1))
    return mean


def _moved(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """Return old + weight (new - old), finite even if squares are too large for the dtype."""
    most = min(torch.finfo(old.dtype).max, torch.finfo(new.dtype).max)
    old = old.clamp(max=most)
    return old + weight * (new.clamp(max=most) - old)


@dataclass(frozen=True)
class ScaleByNegFactoredRms(ScaleByFactoredRms):
    """The step with its minus sign, for chains where nothing follows: it saves a pass."""

    sign = -1


@transformation_of(ScaleByFactoredRms)
def scale_by_factored_rms() -> None:
    r"""Return the transformation that computes Adafactor's step.

    .. math::
        w = k^{\beta}, \quad R' = R + w (\mathrm{mean}_{-1} g^2 - R), \quad
        C' = C + w (\mathrm{mean}_{-2} g^2 - C), \quad
        V = \frac{R' C'}{\mathrm{mean}_{-2} R'}, \quad
        u = \alpha \frac{g / \sqrt V}{\max(1, \mathrm{rms}(g / \sqrt V) / d)}

    with alpha = max(eps2, rms(p)) min(lr, 1 / sqrt(k)). A vector keeps the average of g^2 itself,
    a matrix one row and one column. The step size is part of u; the minus sign is not.

    Args:
        lr: The largest relative step size, >= 0.
        beta2_decay: beta, the exponent of the weight of a new square, <= 0.
        eps1: Lower bound of the root of the second moment; None for the machine epsilon of the
            dtype, of float32 for half types.
        eps2: Lower bound of the root mean square of a parameter, >= 0.
        d: Upper bound of the root mean square of a direction, > 0.

    References:
        N. Shazeer, M. Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, 2018,
        https://arxiv.org/abs/1804.04235, Algorithms 4 and 5.

    Example:
        >>> import torch
        >>> step = scale_by_factored_rms(lr=0.1)
        >>> p, g = torch.tensor([2.0, 2.0]), torch.tensor([0.5, -0.5])
        >>> step.update(g, step.init(p), params=p)[0]  # rms(p) = 2
        tensor([ 0.2000, -0.2000])
    """


@documented(scale_by_factored_rms)
def adafactor(
    lr: float | Tensor = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """Return Adafactor.

    The update is minus the step of `torchopt.transform.scale_by_factored_rms`, minus
    lr weight_decay p.

    Args:
        eps: Lower bounds of the root of the second moment (None for the machine epsilon of the
            dtype, of float32 for half types) and of the root mean square of a parameter.
        weight_decay: Coefficient of the decoupled decay, >= 0.
    """
    check(weight_decay, "a number >= 0", "weight_decay value")
    eps1, eps2 = unpacked(eps, "eps", (None, 0.001))
    flip = flip_sign_and_add_weight_decay.rule(0.0, maximize)
    if are_numbers(weight_decay) and weight_decay == 0.0:
        return compose(
            flip, ScaleByNegFactoredRms(lr, beta2_decay, eps1, eps2, d), name="adafactor"
        )
    decays = not (are_numbers(lr) and lr == 0.0)
    return compose(
        flip,
        ScaleByFactoredRms(lr, beta2_decay, eps1, eps2, d),
        AddDecayedWeights(weight_decay, lr) if decays else None,
        Scale(1.0, -1),
        name="adafactor",
    )
