# SPDX-License-Identifier: Apache-2.0
"""Perturb: random directions, regenerated from a seed and never stored.

A source of directions is a value. Direction `i` is a function of `(seed, i)` alone, so it is the
same whatever the chunk size, in whichever worker, and as often as it is asked for.

| source | mean | covariance | coupled directions |
|---|---|---|---|
| `Gaussian` | 0 | I | none |
| `Rademacher` | 0 | I | none |
| `Sphere` | 0 | I | none |
| `Orthogonal` | 0 | I | blocks of `min(size, D)` orthogonal ones |
| `Sobol` | 0 | I | blocks of `size` scrambled Sobol points |
| `Guided` | 0 | alpha I + (1 - alpha) (D / k) U U' | none |
| `FromDistribution` | yours | yours; should be I | none |

One long file: the sources share how a stream follows from a seed.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchopt.typing import Samplable

__all__ = [
    "Directions",
    "FromDistribution",
    "Gaussian",
    "Guided",
    "Orthogonal",
    "Rademacher",
    "Sobol",
    "Sphere",
    "as_directions",
    "common_draws",
    "draw_seed",
    "member_seed",
    "seeded",
]

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def member_seed(seed: int, member: int) -> int:
    """Return the 32-bit seed of one member of the family of streams named by `seed`.

    Torch's CPU generator uses 32 bits of a seed. For a given `seed` the map is a bijection of
    `member` modulo 2**32 (the finaliser of MurmurHash3), so no two members share a stream.

    Example:
        >>> len({member_seed(7, i) for i in range(100_000)})
        100000
    """
    z = (seed + 0x9E3779B97F4A7C15) & _MASK64  # splitmix64: spread the bits of the family's seed
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    z ^= z >> 31
    h = (z + member) & _MASK32
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK32
    return h ^ (h >> 16)


def draw_seed(generator: torch.Generator | None = None) -> int:
    """Return a seed drawn from `generator`, by default torch's own CPU generator."""
    device = torch.device("cpu") if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device).item())


class seeded:  # noqa: N801 - a context manager as cheap as can be: one for each step
    """Seed torch's generators of the CPU and of the devices of `like`; put them back on exit.

    Entering gives a function that seeds them again.
    """

    def __init__(self, seed: int, like: Sequence[Tensor]) -> None:
        self._seed = seed
        self._devices = {leaf.device for leaf in like if leaf.device.type != "cpu"}
        self._forks = contextlib.ExitStack()

    def __enter__(self) -> Callable[[int], None]:
        self._state = torch.default_generator.get_state()
        for device in self._devices:
            index = 0 if device.index is None else device.index
            fork = torch.random.fork_rng([index], device_type=device.type)
            self._forks.enter_context(fork)
        self._seed_all(self._seed)
        return self._seed_all

    def _seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        for device in self._devices:
            with device:
                torch.get_device_module(device).manual_seed(seed)

    def __exit__(self, *error: object) -> None:
        self._forks.close()
        torch.default_generator.set_state(self._state)


@contextlib.contextmanager
def common_draws(seed: int, like: Sequence[Tensor]) -> Iterator[Callable[[int], None]]:
    """Seed all generators that a function draws from without being given them: those of `seeded`,
    Python's and numpy's; put them back on exit.

    Yields:
        A function that seeds them again.
    """
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    kept = None if numpy is None else numpy.random.get_state()
    try:
        with seeded(seed, like) as seed_torch:

            def seed_all(seed: int) -> None:
                seed_torch(seed)
                random.seed(seed)
                if numpy is not None:
                    numpy.random.seed(seed & _MASK32)

            seed_all(seed)
            yield seed_all
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(kept)


class Directions(ABC):
    """A source of random directions in a space of trees.

    Attributes:
        standard_normal: Whether each direction alone is standard normal. Second derivatives need
            that.
    """

    standard_normal: ClassVar[bool] = False

    def coupled(self, dimension: int) -> int:
        """Return how many consecutive directions are drawn together; such blocks are
        independent of one another, directions within one are not.
        """
        del dimension
        return 1

    def second_moment(self, tree: Sequence[Tensor]) -> list[Tensor]:
        """Return E[z z'] h for the leaves h of a tree: h itself where the covariance is I.

        Raises:
            ValueError: It is not known.
        """
        return list(tree)

    @abstractmethod
    def draw(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1` of the family named by `seed`.

        Args:
            like: The leaves of a point of the space.
            seed: Names the family.
            start: First direction, a multiple of `coupled(D)`.
            stop: One past the last direction.

        Returns:
            For each leaf of shape `[*shape]` a new tensor `[stop - start, *shape]` of its dtype and
            on its device.
        """


# Small directions are drawn several at a time, about as many entries as cost what a call costs, and
# those of moderate size with all leaves in one call; beyond, no more than one leaf need be held.
_ENTRIES_PER_BLOCK = 2**13
_LARGEST_FLAT = 2**16


def _block(dimension: int) -> int:
    """Return how many consecutive directions of independent entries share one seed."""
    return max(1, _ENTRIES_PER_BLOCK // max(dimension, 1))


def _rows_of_blocks(start: int, stop: int, size: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Return rows `start` to `stop - 1` of the concatenation of blocks of `size` rows."""
    blocks = range(start // size, -(-stop // size))
    first = start - blocks.start * size
    return torch.cat([draw(block) for block in blocks])[first : first + stop - start]


class _Independent(Directions):
    """Directions of independent entries.

    Of trees of one dtype and device with at most 2**16 entries, a block of directions is drawn
    flat, as one vector. Those of larger trees are drawn leaf by leaf.
    """

    def fill(self, out: Tensor, generator: torch.Generator) -> None:
        """Write random entries into the contiguous tensor `out`."""
        raise NotImplementedError

    def leaves(self, like: Sequence[Tensor], seed: int, member: int) -> Iterator[Tensor]:
        """Yield direction `member` leaf by leaf, holding one leaf or 2**16 entries at a time."""
        if _is_flat(like):
            yield from (z[0] for z in self.draw(like, seed, member, member + 1))
            return
        generators: dict[torch.device, torch.Generator] = {}
        for leaf in like:
            out = torch.empty_like(leaf, memory_format=torch.contiguous_format)
            if leaf.device not in generators:
                generators[leaf.device] = torch.Generator(leaf.device)
                generators[leaf.device].manual_seed(member_seed(seed, member))
            self.fill(out, generators[leaf.device])
            yield out

    def draw(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1`, as `Directions.draw` says."""
        if _is_flat(like):
            return _split(self._draw_flat(like, seed, start, stop), like)
        outs = [leaf.new_empty((stop - start, *leaf.shape)) for leaf in like]
        kept = {leaf.device: torch.Generator(leaf.device) for leaf in like}
        for row, member in enumerate(range(start, stop)):
            for generator in kept.values():
                generator.manual_seed(member_seed(seed, member))
            for out in outs:
                self.fill(out[row], kept[out.device])
        return outs

    def _draw_flat(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> Tensor:
        dimension = sum(leaf.numel() for leaf in like)
        size = _block(dimension)
        generator = torch.Generator(like[0].device)

        out = like[0].new_empty((stop - start, dimension))
        for number in range(start // size, -(-stop // size)):
            generator.manual_seed(member_seed(seed, number))
            first = number * size - start
            if first >= 0 and first + size <= len(out):
                self.fill(out[first : first + size], generator)
                continue
            block = like[0].new_empty((size, dimension))  # an end of the range lies within it
            self.fill(block, generator)
            inside = slice(max(first, 0), min(first + size, len(out)))
            out[inside] = block[inside.start - first : inside.stop - first]
        return out


def _is_flat(like: Sequence[Tensor]) -> bool:
    return (
        sum(leaf.numel() for leaf in like) <= _LARGEST_FLAT
        and len({(leaf.dtype, leaf.device) for leaf in like}) == 1
    )


def _split(matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the columns of `[n, D]` as one tensor `[n, *shape]` for each leaf."""
    parts = matrix.split([leaf.numel() for leaf in like], dim=1)
    return [
        part.reshape(len(matrix), *leaf.shape).to(device=leaf.device, dtype=leaf.dtype)
        for part, leaf in zip(parts, like)
    ]


@dataclass(frozen=True)
class Gaussian(_Independent):
    """Standard normal directions: E[z] = 0, E[z z'] = I.

    Example:
        >>> z = Gaussian().draw([torch.zeros(2, 3)], seed=0, start=4, stop=9)[0]
        >>> z.shape
        torch.Size([5, 2, 3])
        >>> torch.equal(z[2:3], Gaussian().draw([torch.zeros(2, 3)], seed=0, start=6, stop=7)[0])
        True
    """

    standard_normal: ClassVar[bool] = True

    def fill(self, out: Tensor, generator: torch.Generator) -> None:
        """Write random entries into the contiguous tensor `out`."""
        out.normal_(generator=generator)


@dataclass(frozen=True)
class Rademacher(_Independent):
    """Directions of independent signs +1 and -1: the least variance of any independent entries,
    and those of SPSA.
    """

    def fill(self, out: Tensor, generator: torch.Generator) -> None:
        """Write random entries into the contiguous tensor `out`."""
        out.random_(0, 2, generator=generator).mul_(2).sub_(1)


class _Flat(Directions):
    """Directions that are drawn as vectors of the flattened tree."""

    def rows(self, dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return directions as a matrix `[stop - start, dimension]` on the CPU."""
        raise NotImplementedError

    def draw(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1`, as `Directions.draw` says."""
        dtype = _common_dtype(like)
        dimension = sum(leaf.numel() for leaf in like)
        return _split(self.rows(dimension, seed, start, stop, dtype), like)


def _common_dtype(like: Sequence[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for leaf in like:
        dtype = torch.promote_types(dtype, leaf.dtype)
    return dtype


def _normal_rows(dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return Gaussian directions as a matrix `[stop - start, dimension]` on the CPU."""
    return Gaussian().draw([torch.empty(dimension, dtype=dtype)], seed, start, stop)[0]


@dataclass(frozen=True)
class Sphere(_Flat):
    """Directions uniform on the sphere of radius sqrt(D), D the number of entries of the tree."""

    def rows(self, dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return directions as a matrix `[stop - start, dimension]` on the CPU."""
        z = _normal_rows(dimension, seed, start, stop, dtype)
        scale: Tensor = math.sqrt(dimension) / torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return z * scale


@dataclass(frozen=True)
class Orthogonal(_Flat):
    """Gaussian directions of which every block of `min(size, D)` is orthogonal.

    Each direction alone is standard normal: a block is a uniformly random orthonormal frame, its
    vectors scaled by independent lengths of Gaussian vectors. `D` orthogonal directions in which a
    linear function is measured do not measure the same thing twice.

    Attributes:
        size: Directions in a block; each costs memory D and a block of m time D m^2.

    References:
        K. Choromanski, M. Rowland, V. Sindhwani, R. Turner, A. Weller, Structured Evolution with
        Compact Architectures for Scalable Policy Optimization, ICML 2018,
        https://arxiv.org/abs/1804.02395
    """

    standard_normal: ClassVar[bool] = True

    size: int = 256

    def coupled(self, dimension: int) -> int:
        """Return the number of directions in a block."""
        return max(1, min(self.size, dimension))

    def rows(self, dimension: int, seed: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return directions as a matrix `[stop - start, dimension]` on the CPU."""
        size = self.coupled(dimension)

        blocks = range(start // size, -(-stop // size))
        drawn = torch.empty(len(blocks), 2, dimension, size, dtype=torch.float64)
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
    """Gaussian directions from scrambled Sobol points through the inverse normal distribution.

    Blocks of `size` points are scrambled independently, so that the estimate has a standard error.
    For smooth functions of few variables the error falls faster than 1/sqrt(N).

    Attributes:
        size: Points in a block, a power of two.

    References:
        A. Owen, Scrambled net variance for integrals of smooth functions, Annals of Statistics 25,
        1997.
    """

    standard_normal: ClassVar[bool] = True

    size: int = 64

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
            return torch.empty(stop - start, 0, dtype=dtype)

        def points_of(number: int) -> Tensor:
            engine = torch.quasirandom.SobolEngine(
                dimension, scramble=True, seed=member_seed(seed, number)
            )
            u = engine.draw(size, dtype=torch.float64)
            # The engine's points have 30 bits: the middle of the cell keeps them inside (0, 1).
            normal: Tensor = torch.special.ndtri(u + 2.0**-31)
            return normal

        return _rows_of_blocks(start, stop, size, points_of).to(dtype)


@dataclass(frozen=True, eq=False)
class Guided(_Flat):
    """Gaussian directions stretched along a subspace that is thought to hold the gradient.

        z = sqrt(alpha) x + sqrt((1 - alpha) D / k) U y,   x ~ N(0, I_D), y ~ N(0, I_k),

    with U an orthonormal basis of the subspace. The covariance C = alpha I + (1 - alpha) (D/k) U U'
    has the trace of I, and the estimate has mean C g: a descent direction, but not g.

    Attributes:
        subspace: `[D, k]`, spanning columns, such as flattened surrogate gradients.
        alpha: Share of the variance that is isotropic, in (0, 1].

    References:
        N. Maheswaranathan, L. Metz, G. Tucker, D. Choi, J. Sohl-Dickstein, Guided evolutionary
        strategies, ICML 2019, https://arxiv.org/abs/1806.10230 (eq. 3, here scaled by D).
    """

    subspace: Tensor
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.subspace.ndim != 2:
            raise ValueError(
                f"Guided: expected a subspace of shape [D, k], got {list(self.subspace.shape)}."
            )
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"Guided: expected alpha in (0, 1], got {self.alpha}.")

    def second_moment(self, tree: Sequence[Tensor]) -> list[Tensor]:
        """Return C h."""
        dtype = _common_dtype(tree)
        h = torch.cat([x.detach().to("cpu", dtype).flatten() for x in tree])
        basis = self._basis(len(h), dtype)
        stretch = (1.0 - self.alpha) * len(h) / basis.shape[1]
        product = self.alpha * h + stretch * (basis @ (basis.T @ h))
        return [x[0] for x in _split(product[None], tree)]

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


@dataclass(frozen=True, eq=False)
class FromDistribution(Directions):
    """Directions drawn by `sample(shape)`, one call for each leaf of each direction.

    The samples must come from torch's random generators (global state), which are seeded around
    each direction and put back: that is how a direction is regenerated.

    Attributes:
        sample: Takes the shape of a leaf and returns a tensor of that shape.
        independent: Whether the entries of a sample are independent and alike, whatever its shape.
            Then one call draws all leaves, of many small directions.
        moments: Mean and variance of the independent entries, where they are known.
    """

    sample: Callable[..., Any]
    independent: bool = False
    moments: tuple[float, float] | None = None

    def second_moment(self, tree: Sequence[Tensor]) -> list[Tensor]:
        """Return E[z z'] h, if the moments are known."""
        if not self.independent or self.moments is None:
            raise ValueError(
                "`surrogate`: expected directions of known covariance, got a `distribution` that "
                "only draws: the surrogate would change the mean of the estimate where that "
                "covariance is not I. Use Gaussian(), Rademacher() or another source of "
                "torchopt.diff.zero_order.directions, or a scalar torch distribution."
            )
        mean, variance = self.moments
        total = sum(float(h.double().sum()) for h in tree)
        return [variance * h + mean**2 * total for h in tree]

    def draw(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> list[Tensor]:
        """Return directions `start` to `stop - 1`, as `Directions.draw` says."""
        if self.independent:
            return self._draw_flat(like, seed, start, stop)
        outs = [leaf.new_empty((stop - start, *leaf.shape)) for leaf in like]
        with seeded(0, like) as seed_all:
            for row, member in enumerate(range(start, stop)):
                seed_all(member_seed(seed, member))
                for out, leaf in zip(outs, like):
                    out[row] = self._checked(leaf.shape)
        return outs

    def _draw_flat(self, like: Sequence[Tensor], seed: int, start: int, stop: int) -> list[Tensor]:
        dimension = sum(leaf.numel() for leaf in like)
        size = _block(dimension)
        with seeded(0, like) as seed_all:

            def block_of(number: int) -> Tensor:
                seed_all(member_seed(seed, number))
                return self._checked(torch.Size((size, dimension)))

            return _split(_rows_of_blocks(start, stop, size, block_of), like)

    def _checked(self, shape: torch.Size) -> Tensor:
        drawn = self.sample(shape)
        if not isinstance(drawn, Tensor) or drawn.shape != shape:
            got = list(drawn.shape) if isinstance(drawn, Tensor) else type(drawn)
            raise ValueError(
                f"`distribution`: expected a tensor of shape {list(shape)}, "
                f"the shape that was asked for, got {got}."
            )
        return drawn


def _is_standard_normal(distribution: Any) -> bool:
    if distribution is torch.randn:
        return True
    return (
        type(distribution) is torch.distributions.Normal
        and distribution.batch_shape == ()
        and bool(distribution.loc == 0.0)
        and bool(distribution.scale == 1.0)
    )


def _moments(distribution: torch.distributions.Distribution) -> tuple[float, float] | None:
    try:
        mean, variance = distribution.mean, distribution.variance
    except (NotImplementedError, RuntimeError, ValueError):
        return None
    if mean.numel() != 1 or not (mean.isfinite().all() and variance.isfinite().all()):
        return None
    return float(mean), float(variance)


def as_directions(distribution: Any) -> Directions:
    """Return `distribution` as a source of directions.

    Args:
        distribution: A `Directions` value, an object with a method `sample(shape)`, or a callable
            `f(shape)`. `torch.randn` and a scalar standard `torch.distributions.Normal` are
            `Gaussian()`; any other scalar torch distribution has independent entries.

    Raises:
        TypeError: It is none of the three.
    """
    if isinstance(distribution, Directions):
        return distribution
    if _is_standard_normal(distribution):
        return Gaussian()
    if isinstance(distribution, torch.distributions.Distribution):
        scalar = distribution.batch_shape == () and distribution.event_shape == ()
        return FromDistribution(distribution.sample, scalar, _moments(distribution))
    if isinstance(distribution, Samplable):
        return FromDistribution(distribution.sample)
    if callable(distribution):
        return FromDistribution(distribution)
    raise TypeError("`distribution` must be a callable or an instance of `Samplable`.")
