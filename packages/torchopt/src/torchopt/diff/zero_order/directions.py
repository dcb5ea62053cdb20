# SPDX-License-Identifier: Apache-2.0
"""Random directions, which are regenerated from a seed and never stored.

Direction `i` of a source is a function of `(seed, i)` alone. So it is the same in every worker, for
every chunk size, and each time that it is drawn.

| source | mean | covariance | coupled directions |
|---|---|---|---|
| `Gaussian` | 0 | I | none |
| `Rademacher` | 0 | I | none |
| `Sphere` | 0 | I | none |
| `Orthogonal` | 0 | I | blocks of `min(size, D)` orthogonal ones |
| `Sobol` | 0 | I | blocks of `size` scrambled Sobol points |
| `Guided` | 0 | alpha I + (1 - alpha) (D / k) U U' | none |
| `FromDistribution` | yours | yours; should be I | none |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.closure import captured
from torchopt.diff.zero_order.independent import (
    Directions,
    Gaussian,
    Rademacher,
    block_size,
    rows_of_blocks,
    split,
)
from torchopt.diff.zero_order.seeds import common_draws, draw_seed, member_seed, seeded
from torchopt.diff.zero_order.structured import Guided, Orthogonal, Sobol, Sphere
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


@dataclass(frozen=True, eq=False)
class FromDistribution(Directions):
    """Directions drawn by `sample(shape)`, one call for each leaf of each direction.

    The samples must come from torch's global random generators. These are seeded for each direction
    and restored afterwards, so that a direction can be regenerated.

    Attributes:
        sample: Takes the shape of a leaf and returns a tensor of that shape.
        independent: Whether the entries of a sample are independent and identically distributed,
            for any shape. Then one call draws all leaves of many small directions.
        moments: Mean and variance of independent entries, if they are known.

    Example:
        >>> source = FromDistribution(torch.randn)
        >>> source.draw([torch.zeros(2, 3)], seed=0, start=0, stop=5)[0].shape
        torch.Size([5, 2, 3])
    """

    sample: Callable[..., Any]
    independent: bool = False
    moments: tuple[float, float] | None = None

    def second_moment(self, tree: Sequence[Tensor]) -> list[Tensor]:
        """Return E[z z'] h.

        Raises:
            ValueError: The moments are not known.
        """
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

    def drawn_together(self, dimension: int) -> int:
        """Return the number of directions in a block, or 1 if they are drawn one by one."""
        return block_size(dimension) if self.independent else 1

    def joins_leaves(self) -> bool:
        """Return whether one call draws all leaves."""
        return self.independent and type(self).draw is FromDistribution.draw

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
        size = block_size(dimension)
        with seeded(0, like) as seed_all:

            def block_of(number: int) -> Tensor:
                seed_all(member_seed(seed, number))
                return self._checked(torch.Size((size, dimension)))

            return split(rows_of_blocks(start, stop, size, block_of), like)

    def _checked(self, shape: torch.Size) -> Tensor:
        drawn = self.sample(shape)
        if not isinstance(drawn, Tensor) or drawn.shape != shape:
            got = list(drawn.shape) if isinstance(drawn, Tensor) else type(drawn)
            raise ValueError(
                f"`distribution`: expected a tensor of shape {list(shape)}, "
                f"the shape that was requested, got {got}."
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


def _require_constant(distribution: Any) -> None:
    """Raise if parameters of a torch distribution require a gradient, which they would not get."""
    if not isinstance(distribution, torch.distributions.Distribution):
        return
    name = next((n for n, x in captured(distribution, Tensor) if x.requires_grad), None)
    if name is not None:
        raise ValueError(
            f"`distribution`: expected parameters without a gradient, got {name} that requires "
            "one. An estimate is not differentiated in its distribution: detach it."
        )


def as_directions(distribution: Any) -> Directions:
    """Return `distribution` as a source of directions.

    Args:
        distribution: A `Directions` value, an object with a method `sample(shape)`, or a callable
            `f(shape)`. `torch.randn` and a scalar standard `torch.distributions.Normal` are
            `Gaussian()`; any other scalar torch distribution has independent entries.

    Raises:
        TypeError: `distribution` is none of the three, or a class.
        ValueError: A parameter of a torch distribution requires a gradient.
    """
    if isinstance(distribution, Directions):
        return distribution
    if isinstance(distribution, type):
        name = distribution.__name__
        raise TypeError(
            f"`distribution`: expected an object that draws, got the class {name}; make one, such "
            "as torch.distributions.Normal(0.0, 1.0)."
        )
    _require_constant(distribution)
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
