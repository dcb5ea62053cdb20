# SPDX-License-Identifier: Apache-2.0
"""Directions that depend on one another, or on a subspace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchopt.diff.zero_order.independent import Directions, Gaussian, rows_of_blocks, split
from torchopt.diff.zero_order.seeds import member_seed

__all__ = ["Guided", "Orthogonal", "Sobol", "Sphere"]


class _Flat(Directions):
    """A source that draws directions as vectors of the flattened tree."""

    def rows(self, dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return directions as a matrix `[stop - start, dimension]` on the CPU."""
        raise NotImplementedError

    def joins_leaves(self) -> bool:
        """Return whether directions are drawn by this class, not by a `draw` of a subclass."""
        return type(self).draw is _Flat.draw

    def draw(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1`, as `Directions.draw` says."""
        dtype = _common_dtype(like)
        dimension = sum(leaf.numel() for leaf in like)
        return split(self.rows(dimension, seed, start, stop, dtype), like)


def _common_dtype(like: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for leaf in like:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cpu")  # whatever the default device is


def _normal_rows(dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return Gaussian directions as a matrix `[stop - start, dimension]` on the CPU."""
    return Gaussian().draw([_empty(dimension, dtype=dtype)], seed, start, stop)[0]


@dataclass(frozen=True)
class Sphere(_Flat):
    """Directions uniform on the sphere of radius sqrt(D), for D entries of the tree.

    Example:
        >>> z = Sphere().draw([torch.zeros(4)], seed=0, start=0, stop=2)[0]
        >>> torch.linalg.vector_norm(z, dim=1).round(decimals=4)
        tensor([2., 2.])
    """

    def rows(self, dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return directions as a matrix `[stop - start, dimension]` on the CPU."""
        z = _normal_rows(dimension, seed, start, stop, dtype)
        scale: Tensor = math.sqrt(dimension) / torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return z * scale


@dataclass(frozen=True)
class Orthogonal(_Flat):
    """Gaussian directions that are orthogonal in blocks of `min(size, D)`.

    Each direction by itself is standard normal. A block is a uniformly random orthonormal frame
    whose vectors are scaled by independent lengths of Gaussian vectors. Orthogonal directions
    reduce the variance: for a linear function they do not measure the same component twice.

    Attributes:
        size: The number of directions in a block, >= 1. A block of m takes memory D m and time
            D m^2.

    Raises:
        ValueError: `size` is not an integer of at least 1.

    References:
        K. Choromanski, M. Rowland, V. Sindhwani, R. Turner, A. Weller, Structured Evolution with
        Compact Architectures for Scalable Policy Optimization, ICML 2018,
        https://arxiv.org/abs/1804.02395

    Example:
        >>> like = [torch.zeros(3, dtype=torch.float64)]
        >>> a, b, c = Orthogonal().draw(like, seed=0, start=0, stop=3)[0]
        >>> max(abs(a @ b), abs(b @ c), abs(a @ c)).item() < 1e-12
        True
    """

    standard_normal: ClassVar[bool] = True

    size: int = 256

    def __post_init__(self) -> None:
        if not _is_count(self.size):
            raise ValueError(
                f"Orthogonal: size: expected an integer of at least 1, got {self.size!r}."
            )

    def coupled(self, dimension: int) -> int:
        """Return the number of directions in a block."""
        return max(1, min(self.size, dimension))

    def rows(self, dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return directions as a matrix `[stop - start, dimension]` on the CPU."""
        size = self.coupled(dimension)

        blocks = range(start // size, -(-stop // size))
        drawn = _empty(len(blocks), 2, dimension, size, dtype=torch.float64)
        generator = torch.Generator()
        for out, block in zip(drawn, blocks):
            out.normal_(generator=generator.manual_seed(member_seed(seed, block)))
        q, r = torch.linalg.qr(drawn[:, 0])
        # The signs make the frames uniformly distributed (Mezzadri 2007).
        signs = torch.sign(torch.diagonal(r, dim1=1, dim2=2))
        scale = signs * torch.linalg.vector_norm(drawn[:, 1], dim=1)
        rows: Tensor = (q * scale[:, None]).mT.reshape(len(blocks) * size, dimension)
        first = start - blocks.start * size
        return rows[first : first + stop - start].to(dtype)


@dataclass(frozen=True)
class Sobol(_Flat):
    """Gaussian directions: scrambled Sobol points, mapped by the inverse normal distribution.

    Blocks of `size` points are scrambled independently, so the standard error of an estimate is
    known. For smooth functions of few variables the error falls faster than 1/sqrt(N).

    Attributes:
        size: The number of points in a block, a power of two, for which they are balanced.

    Raises:
        ValueError: `size` is not a power of two; or when directions are drawn: the tree has more
            entries than `torch.quasirandom.SobolEngine` has dimensions.

    References:
        A. Owen, Scrambled net variance for integrals of smooth functions, Annals of Statistics 25,
        1997.

    Example:
        >>> z = Sobol(size=64).draw([torch.zeros(2)], seed=0, start=0, stop=64)[0]
        >>> z.shape, z.mean(0).abs().max().item() < 0.05  # 64 independent means reach 0.125
        (torch.Size([64, 2]), True)
    """

    standard_normal: ClassVar[bool] = True

    size: int = 64

    def __post_init__(self) -> None:
        if not _is_count(self.size) or self.size & (self.size - 1):
            raise ValueError(f"Sobol: size: expected a power of two, got {self.size!r}.")

    def coupled(self, dimension: int) -> int:
        """Return the number of directions in a block."""
        limit = torch.quasirandom.SobolEngine.MAXDIM
        if dimension > limit:
            raise ValueError(
                f"Sobol: expected a tree of at most {limit} entries, got {dimension}. "
                "Use Orthogonal or Gaussian directions."
            )
        return self.size

    def rows(self, dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return directions as a matrix `[stop - start, dimension]` on the CPU."""
        size = self.coupled(dimension)
        if not dimension:
            return _empty(stop - start, 0, dtype=dtype)

        def points_of(number: int) -> Tensor:
            engine = torch.quasirandom.SobolEngine(
                dimension, scramble=True, seed=member_seed(seed, number)
            )
            # draw() rounds the first point to the default dtype.
            first = engine.quasi.double() * 2.0**-engine.MAXBIT
            u = engine.draw(size, dtype=torch.float64)
            u[0] = first
            # The engine's points have 30 bits; the middle of a cell lies inside (0, 1).
            normal: Tensor = torch.special.ndtri(u + 2.0**-31)
            return normal

        return rows_of_blocks(start, stop, size, points_of).to(dtype)


@dataclass(frozen=True, eq=False)
class Guided(_Flat):
    """Gaussian directions stretched along a subspace that presumably contains the gradient.

        z = sqrt(alpha) x + sqrt((1 - alpha) D / k) U y,   x ~ N(0, I_D), y ~ N(0, I_k),

    where U is an orthonormal basis of the subspace. The covariance C = alpha I + (1 - alpha) (D/k)
    U U' has the same trace as I. The mean of the estimate is C g, a descent direction but not g.

    Attributes:
        subspace: `[D, k]`, whose columns span the subspace, such as flattened surrogate gradients.
        alpha: The share of the variance that is isotropic, in (0, 1].

    Raises:
        ValueError: The subspace is not a matrix with columns, or `alpha` is out of its range.

    References:
        N. Maheswaranathan, L. Metz, G. Tucker, D. Choi, J. Sohl-Dickstein, Guided evolutionary
        strategies, ICML 2019, https://arxiv.org/abs/1806.10230 (here scaled by D).

    Example:
        >>> guide = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
        >>> Guided(guide).second_moment([torch.tensor([1.0, 1.0, 0.0, 0.0])])  # C h
        [tensor([2.5000, 0.5000, 0.0000, 0.0000])]
    """

    subspace: Tensor
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.subspace, Tensor) or self.subspace.ndim != 2:
            tensor = isinstance(self.subspace, Tensor)
            got = list(self.subspace.shape) if tensor else type(self.subspace).__name__
            raise ValueError(f"Guided: expected a subspace of shape [D, k], a tensor, got {got}.")
        if not self.subspace.shape[1]:
            raise ValueError("Guided: expected a subspace of at least one column, got none.")
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"Guided: expected alpha in (0, 1], got {self.alpha}.")

    def second_moment(self, tree: Sequence[Tensor]) -> list[Tensor]:
        """Return C h."""
        dtype = _common_dtype(tree)
        h = torch.cat([x.detach().to("cpu", dtype).flatten() for x in tree])
        basis = self._basis(len(h), dtype)
        stretch = (1.0 - self.alpha) * len(h) / basis.shape[1]
        product = self.alpha * h + stretch * (basis @ (basis.T @ h))
        return [x[0] for x in split(product[None], tree)]

    def precision(self, z: Tensor) -> Tensor:
        """Return C^-1 z for rows z, `[n, D]`."""
        dimension = z.shape[1]
        basis = self._basis(dimension, z.dtype).to(z.device)
        stretch = (1.0 - self.alpha) * dimension / basis.shape[1]
        inside = (z @ basis) @ basis.T
        rest: Tensor = z - stretch / (self.alpha + stretch) * inside
        return rest / self.alpha

    def _basis(self, dimension: int, dtype: torch.dtype) -> Tensor:
        if self.subspace.shape[0] != dimension:
            raise ValueError(
                f"Guided: expected a subspace of shape [{dimension}, k] for a tree of {dimension} "
                f"entries, got {list(self.subspace.shape)}."
            )
        basis: Tensor = torch.linalg.qr(self.subspace.detach().to("cpu", dtype))[0]
        return basis

    def rows(self, dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return directions as a matrix `[stop - start, dimension]` on the CPU."""
        basis = self._basis(dimension, dtype)
        k = basis.shape[1]
        z = _normal_rows(dimension + k, seed, start, stop, dtype)
        stretch = math.sqrt((1.0 - self.alpha) * dimension / k)
        along: Tensor = stretch * (z[:, dimension:] @ basis.T)
        return along.add(z[:, :dimension], alpha=math.sqrt(self.alpha))
