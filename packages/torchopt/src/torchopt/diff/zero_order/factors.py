# SPDX-License-Identifier: Apache-2.0
"""Perturbations of low rank: how layers apply them, and how they are summed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torchopt.diff.zero_order.error_bars import scaled
from torchopt.diff.zero_order.precision import accumulator

__all__ = ["Factors", "LowRankNoise", "Perturb", "Total", "square_norms"]


@dataclass(frozen=True)
class Factors:
    """One or many perturbations E = A B' / sqrt(r) of a weight.

    Attributes:
        A: The left factor, `[*members, m, r]`.
        B: The right factor, `[*members, n, r]`.

    Example:
        >>> f = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
        >>> f.materialize(torch.zeros(2, 2))
        tensor([[1., 3.],
                [2., 6.]])
    """

    A: Tensor
    B: Tensor

    def materialize(self, weight: Tensor) -> Tensor:
        """Return E for each member, in the shape of the weight."""
        E = self.A @ self.B.mT / math.sqrt(self.A.shape[-1])
        return E.reshape(*self.A.shape[:-2], *weight.shape)


@dataclass(frozen=True)
class LowRankNoise:
    """Perturbations of all parameters of a module, for a chunk of members.

    Attributes:
        factors: By parameter name, for weights with two or more dimensions.
        dense: By parameter name, `[members, *shape]`, for other parameters.
    """

    factors: dict[str, Factors]
    dense: dict[str, Tensor]

    def materialize(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the full perturbations `[members, *shape]`."""
        full = {name: f.materialize(params[name]) for name, f in self.factors.items()}
        return {**full, **self.dense}


_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# Attributes and methods of a weight that do not depend on its values.
_ATTRIBUTES = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex}


class Perturb(TorchFunctionMode):
    """A context in which every use of a weight gets the weight plus its perturbation."""

    def __init__(self, factors: dict[int, Factors], scale: float) -> None:
        super().__init__()
        self.factors = factors
        self.scale = scale

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ATTRIBUTES:
            return func(*args, **kwargs)
        names: tuple[str, ...] = ()
        if func is functional.linear:
            names = ("input", "weight", "bias")
        elif func is functional.embedding:
            names = ("input", "weight", "padding_idx", "max_norm")
        elif func in _CONVOLUTIONS:
            names = _CONVOLUTION_ARGUMENTS
        given = {**dict(zip(names, args)), **kwargs}
        weight = given.get("weight")
        if names and id(weight) in self.factors and id(given.get("input")) not in self.factors:
            bound = {k: self._full(v) if k != "weight" else v for k, v in given.items()}
            rest = args[len(names) :]
            if func is functional.linear:
                return self._linear(bound)
            if func is functional.embedding and bound.get("max_norm") is None and not rest:
                return self._embedding(func, given)
            if func in _CONVOLUTIONS:
                return self._convolution(func, bound)
        return func(*(self._full(x) for x in args), **{k: self._full(v) for k, v in kwargs.items()})

    def _full(self, x: Any) -> Any:
        if isinstance(x, (tuple, list)) and any(id(y) in self.factors for y in x):
            return type(x)(self._full(y) for y in x)
        if id(x) not in self.factors:
            return x
        return x + self.scale * self.factors[id(x)].materialize(x)

    def _scaled(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        f = self.factors[id(weight)]
        return f.A * (self.scale / math.sqrt(f.A.shape[-1])), f.B

    def _linear(self, given: dict[str, Any]) -> Tensor:
        x, weight = given["input"], given["weight"]
        A, B = self._scaled(weight)
        y: Tensor = functional.linear(x, weight) + (x @ B) @ A.mT
        bias = given.get("bias")
        return y if bias is None else y + bias

    def _embedding(self, func: Any, given: dict[str, Any]) -> Tensor:
        A, B = self._scaled(given["weight"])
        base: Tensor = func(**given)
        return base + functional.embedding(given["input"], A) @ B.mT

    def _convolution(self, func: Any, given: dict[str, Any]) -> Tensor:
        weight = given["weight"]
        groups = given.get("groups", 1)
        A, B = self._scaled(weight)
        rank = A.shape[-1]
        filters = B.mT.reshape(rank, *weight.shape[1:])
        # The r filters are applied to every group of input channels; an output channel uses those
        # of its own group.
        filters = filters.repeat(groups, *(1,) * (weight.ndim - 1))
        thin = func(**{**given, "weight": filters, "bias": None})
        ones = (1,) * (weight.ndim - 2)
        along: Tensor = func(thin, A.reshape(A.shape[0], rank, *ones), groups=groups)
        base: Tensor = func(**given)
        return base + along


class Total:
    """Accumulates sum_i c_i E_i of one parameter, in float32 or wider.

    The sum of the squares of its terms is accumulated in float64.
    """

    def __init__(self, weight: Tensor, with_error: bool) -> None:
        self.dtype = weight.dtype
        dtype = accumulator(weight.dtype)
        self.sum = torch.zeros_like(weight, dtype=dtype, requires_grad=False)
        self.squares = torch.zeros_like(self.sum, dtype=torch.float64) if with_error else None

    def add_factors(self, c: Tensor, f: Factors) -> None:
        """Add perturbations times their coefficients."""
        f = Factors(f.A.to(self.sum.dtype), f.B.to(self.sum.dtype))
        c = c.to(f.A)
        self.sum += _weighted_sum(f, c).reshape(self.sum.shape)
        if self.squares is not None:
            unit, scale = scaled(c)
            part = _weighted_sum(_squared(f), unit.square()).reshape(self.sum.shape)
            self.squares += part.double() * scale.square()

    def add_dense(self, c: Tensor, z: Tensor) -> None:
        """Add dense directions times their coefficients."""
        z = z.to(self.sum.dtype)
        c = c.to(z)
        self.sum += torch.tensordot(c, z, dims=1)
        if self.squares is not None:
            unit, scale = scaled(c)
            part = torch.tensordot(unit.square(), z.square(), dims=1)
            self.squares += part.double() * scale.square()

    def mean(self, n: int) -> Tensor:
        """Return the mean over n members."""
        return (self.sum / n).to(self.dtype)

    def standard_error(self, n: int) -> Tensor:
        """Return the standard error of the mean over n members."""
        assert self.squares is not None
        variance = self.squares / n - (self.sum / n).double().square()
        return (variance.clamp(min=0.0) / (n - 1)).sqrt().to(self.dtype)


def _weighted_sum(f: Factors, weights: Tensor) -> Tensor:
    """Return sum_i w_i A_i B_i' / sqrt(r), `[m, n]`, as one product of inner size N r."""
    r = f.A.shape[-1]
    A = f.A * (weights[:, None, None] / math.sqrt(r))
    product: Tensor = A.transpose(1, 2).flatten(0, 1).mT @ f.B.transpose(1, 2).flatten(0, 1)
    return product


def _squared(f: Factors) -> Factors:
    """Return the elementwise square of each perturbation, as factors of rank r^2."""
    return Factors(*((x[..., :, None] * x[..., None, :]).flatten(-2) for x in (f.A, f.B)))


def square_norms(noise: LowRankNoise) -> Tensor:
    """Return the squared norm of each member, `[members]`."""
    wide = (z.to(accumulator(z.dtype)) for z in noise.dense.values())
    parts = [z.reshape(len(z), z[0].numel()).square().sum(1) for z in wide]
    for f in noise.factors.values():
        f = Factors(*(x.to(accumulator(x.dtype)) for x in (f.A, f.B)))
        # |A B'|^2 = trace of (A'A)(B'B)
        parts.append(((f.A.mT @ f.A) * (f.B.mT @ f.B)).sum((1, 2)) / f.A.shape[-1])
    return torch.stack(parts).sum(0)
