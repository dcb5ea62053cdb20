# SPDX-License-Identifier: Apache-2.0
"""Adafactor: second moments of matrices kept as rows and columns."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt import _C
from torchopt.base import GradientTransformation
from torchopt.documented import documented
from torchopt.kernels.missing import why_missing
from torchopt.kernels.reference.root import root
from torchopt.optimizers.stages import compose, flip_sign_and_add_weight_decay
from torchopt.torch_internals import bump_versions
from torchopt.transform.base import LeafRule, transformation
from torchopt.transform.counts import for_each_distinct, increment, zero_counts
from torchopt.transform.linear import AddDecayedWeights, Scale
from torchopt.transform.validate import are_numbers, check_at_least_zero, unpacked
from torchopt.tree_function import any_watched, are_plain

__all__ = ["ScaleByFactoredRmsState", "adafactor", "scale_by_factored_rms"]


class ScaleByFactoredRmsState(NamedTuple):
    """`rows`, `columns`: means of the squared gradient; of a vector, `rows` is the square."""

    rows: Any
    columns: Any
    count: Any


@dataclass(frozen=True)
class ScaleByFactoredRms(LeafRule):
    """u = sign alpha_k g / sqrt(row mean times column mean), clipped; `sign` is 1 or -1."""

    lr: float | Tensor
    beta2_decay: float | Tensor
    eps1: float | Tensor | None
    eps2: float | Tensor
    d: float | Tensor
    sign: int = 1
    leaf_fields: ClassVar[tuple[str, ...]] = ("rows", "columns", "count")
    compressed: ClassVar[bool] = True
    complex_numbers: ClassVar[str] = "refused"
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
        """Return the steps and the new means."""
        counts = increment(state.count)
        roles = (grads, params, state.rows, state.columns)
        read = itertools.chain(*roles, [self.lr] if isinstance(self.lr, Tensor) else [])
        simple = are_numbers(self.beta2_decay, self.eps1, self.eps2, self.d) and not (
            isinstance(self.lr, Tensor) and self.lr.ndim
        )
        if simple and are_plain(*roles) and not any_watched(read):
            updates, rows, columns = self._together(*roles, counts, inplace=inplace)
        else:
            updates, rows, columns = self._one_by_one(*roles, counts)
        return updates, ScaleByFactoredRmsState(rows=rows, columns=columns, count=counts)

    def _one_by_one(
        self,
        grads: list[Tensor],
        params: list[Tensor],
        old_rows: list[Tensor],
        old_columns: list[Tensor],
        counts: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return updates, rows and columns as differentiable functions of everything."""
        columns: list[Tensor] = []
        rows: list[Tensor] = []
        updates = []
        scalars = for_each_distinct(self._scalars, counts, [g.dtype for g in grads])
        for g, p, row, column, (weight, rho) in zip(grads, params, old_rows, old_columns, scalars):
            eps1 = self._eps1(g)
            square = g * g
            if g.ndim > 1:
                row = _moved_one(row, square.mean(dim=-1, keepdim=True), weight)
                column = _moved_one(column, square.mean(dim=-2, keepdim=True), weight)
                mean = row.mean(dim=-2, keepdim=True)
                mean = mean.clamp(max=torch.finfo(mean.dtype).max).clamp(min=eps1)
                variance = row / mean * column
            else:
                row = variance = _moved_one(row, square, weight)
            rows.append(row)
            columns.append(column)
            u = g * variance.clamp(min=eps1 * eps1).rsqrt()
            size = max(g.numel(), 1) ** 0.5
            alpha = (root((p * p).sum()) / size).clamp(min=self.eps2) * rho
            updates.append(u * (alpha / (root((u * u).sum()) / (size * self.d)).clamp(min=1.0)))
        return updates, rows, columns

    def _eps1(self, g: Tensor) -> float | Tensor:
        return torch.finfo(g.dtype).eps if self.eps1 is None else self.eps1

    def _together(
        self,
        grads: list[Tensor],
        params: list[Tensor],
        old_rows: list[Tensor],
        old_columns: list[Tensor],
        counts: list[Tensor],
        *,
        inplace: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the values of `_one_by_one`, in few operations on lists of tensors."""
        if len(set(map(id, counts))) == 1 and not isinstance(self.lr, Tensor):
            values = self._values(counts[0], grads[0].dtype)
            found = self._natively(grads, params, old_rows, old_columns, *values, inplace=inplace)
            if found is not None:
                return found
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, (x, y, count) in enumerate(zip(grads, params, counts)):
            key = (x.dtype, y.dtype, x.device, y.device, x.ndim > 1, id(count))
            groups.setdefault(key, []).append(i)
        updates, rows, columns = list(grads), list(old_rows), list(old_columns)
        for indices in groups.values():
            roles = (grads, params, old_rows, old_columns)
            g, p, row, column = ([role[i] for i in indices] for role in roles)
            weight, rho = self._values(counts[indices[0]], g[0].dtype)
            found = self._natively(g, p, row, column, weight, rho, inplace=inplace)
            if found is not None:
                for k, i in enumerate(indices):
                    updates[i], rows[i], columns[i] = (role[k] for role in found)
                continue
            eps1 = self._eps1(g[0])
            assert not isinstance(eps1, Tensor)
            variance = list(torch._foreach_mul(g, g))
            variance = [v.to(r.dtype) for v, r in zip(variance, row)]
            if g[0].ndim > 1:
                row = _moved(row, [v.mean(dim=-1, keepdim=True) for v in variance], weight, inplace)
                column = _moved(
                    column, [v.mean(dim=-2, keepdim=True) for v in variance], weight, inplace
                )
                means = [r.mean(dim=-2, keepdim=True) for r in row]
                torch._foreach_clamp_min_(means, eps1)
                torch._foreach_clamp_max_(means, torch.finfo(means[0].dtype).max)
                scaled = torch._foreach_div(row, means)
                for v, r, c in zip(variance, scaled, column):
                    torch.mul(r, c, out=v)
                torch._foreach_clamp_min_(variance, eps1 * eps1)
            else:
                row = _moved(row, variance, weight, inplace)
                variance = list(torch._foreach_clamp_min(row, eps1 * eps1))
            torch._foreach_pow_(variance, -0.5)
            torch._foreach_mul_(variance, g)
            norms = torch.stack(torch._foreach_norm([*p, *variance]))
            factors = self._factors(norms, [max(x.numel(), 1) ** 0.5 for x in g], rho)
            torch._foreach_mul_(variance, factors)
            for k, i in enumerate(indices):
                updates[i], rows[i], columns[i] = variance[k], row[k], column[k]
        return updates, rows, columns

    def _natively(
        self,
        g: list[Tensor],
        p: list[Tensor],
        row: list[Tensor],
        column: list[Tensor],
        *numbers: Any,
        inplace: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]] | None:
        """Return updates, rows and columns by one native call; None where there is none."""
        if why_missing(_C) is not None or g[0].device.type != "cpu":
            return None
        eps1 = -1.0 if self.eps1 is None else self.eps1
        hypers = [float(h) for h in (*numbers, eps1, self.eps2, self.d)]
        threads = torch.get_num_threads()
        found = _C.factored_rms(g, p, row, column, hypers, inplace, threads)
        if found is not None and inplace:
            bump_versions([*row, *column])
        return found

    def _factors(self, norms: Tensor, roots: list[float], rho: float | Tensor) -> Any:
        """Return what each direction is multiplied by; numbers on the CPU, else 0-dim tensors.

        Args:
            norms: Those of the parameters, and then those of the directions.
            roots: Of the numbers of elements.
            rho: The relative step size.
        """
        if norms.device.type != "cpu":
            sizes = torch.tensor(2 * roots, dtype=norms.dtype).to(norms.device, non_blocking=True)
            of_p, of_u = (norms / sizes).split(len(roots))
            factors = of_p.clamp(min=self.eps2) / (of_u / self.d).clamp(min=1.0) * rho
            return list(factors.unbind())
        n, rho, values = len(roots), float(rho), norms.tolist()
        out = []
        for root_of_size, of_p, of_u in zip(roots, values[:n], values[n:]):
            size = of_p / root_of_size
            excess = of_u / (root_of_size * self.d)
            # In this order NaN stays NaN.
            out.append(
                (self.eps2 if size < self.eps2 else size) * rho / (1.0 if excess < 1.0 else excess)
            )
        return out

    def _values(self, count: Tensor, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
        """Return `_scalars`, as numbers where no device has to be waited for."""
        if count.device.type != "cpu" or isinstance(self.lr, Tensor):
            return self._scalars(count, dtype)
        k = float(count)
        return k**self.beta2_decay, self.sign * min(self.lr, k**-0.5)

    def _scalars(self, count: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weight of a new square, and the relative step size with its sign."""
        k = count.to(torch.float64)
        lr = torch.as_tensor(self.lr, dtype=torch.float64, device=k.device)
        weight = torch.pow(k, self.beta2_decay)
        return weight.to(dtype), self.sign * torch.minimum(lr, 1 / k.sqrt()).to(dtype)


def _moved_one(old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
    """Return old + weight (new - old), finite where squares are too large for the dtype."""
    most = torch.finfo(old.dtype).max
    old = old.clamp(max=most)
    return old + weight * (new.clamp(max=most) - old)


def _moved(
    old: list[Tensor], new: list[Tensor], weight: float | Tensor, inplace: bool
) -> list[Tensor]:
    """Return the values of `_moved_one`; writes into `new`, and with `inplace` into `old`."""
    out = old if inplace else [x.clone() for x in old]
    for tensors in (new, out):
        torch._foreach_clamp_max_(tensors, torch.finfo(out[0].dtype).max)
    if isinstance(weight, Tensor):
        change = torch._foreach_sub(new, out)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(out, change)
    else:
        torch._foreach_lerp_(out, new, weight)
    return out


@transformation
def scale_by_factored_rms(
    lr: float | Tensor = 1e-2,
    beta2_decay: float | Tensor = -0.8,
    eps1: float | Tensor | None = None,
    eps2: float | Tensor = 1e-3,
    d: float | Tensor = 1.0,
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
        eps1: Smallest root of the second moment; None for the spacing of the dtype at
            one, of float32 for half types.
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
    if are_numbers(beta2_decay) and not beta2_decay <= 0:
        raise ValueError(f"Invalid beta2_decay value: {beta2_decay}; expected a number <= 0")
    if are_numbers(d) and not d > 0:
        raise ValueError(f"Invalid d value: {d}; expected a number > 0")
    return ScaleByFactoredRms(lr, beta2_decay, eps1, eps2, d)


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
        beta2_decay: Exponent of the weight of a new square, <= 0.
        eps: Smallest root of the second moment (None for the spacing of the dtype at one, of
            float32 for half types), and smallest root mean square that a parameter counts for.
        weight_decay: Coefficient of the decoupled decay, >= 0.
    """
    check_at_least_zero(weight_decay, "weight_decay value")
    eps1, eps2 = unpacked(eps, 2, "eps")
    rule = scale_by_factored_rms.rule(lr, beta2_decay, eps1, eps2, d)
    assert isinstance(rule, ScaleByFactoredRms)
    flip = flip_sign_and_add_weight_decay.rule(0.0, maximize)
    if are_numbers(weight_decay) and weight_decay == 0.0:
        return compose(flip, dataclasses.replace(rule, sign=-1), name="adafactor")  # one pass less
    decays = not (are_numbers(lr) and lr == 0.0)
    return compose(
        flip,
        rule,
        AddDecayedWeights(weight_decay, lr) if decays else None,
        Scale(1.0, -1),
        name="adafactor",
    )
