# SPDX-License-Identifier: Apache-2.0
"""Search distributions: learn the mean and the scale of perturbations by gradients.

Let x = mean + s * z with standard normal z and s = exp(log_scale). The expected loss J = E f(x) has
the gradients

    dJ/dmean = E f(x) z / s,      dJ/dlog_scale = E f(x) (z^2 - 1),

element by element. A `SearchDistribution` is a tree, which any optimizer of torchopt can update
with the gradient of an `estimate`:

| estimator | evaluations | gradient for the mean | for log_scale |
|---|---|---|---|
| `PGPE` | N pairs at z_i and -z_i | 1/N sum (f_i - f_-i)/2 z_i / s | 1/N sum r_i (z_i^2 - 1) |
| `SNES` | N at z_i | 1/N sum r_i s z_i | 1/(2N) sum r_i (z_i^2 - 1) |
| `GuidedES` | N pairs, guided | 1/N sum (f_i - f_-i)/2 z_i / s | 1/N sum r_i (z_i'C^-1 z_i - D) |

r_i is the loss (for a pair, the mean of its losses) minus the mean of all others, which makes both
gradients of PGPE and SNES unbiased. SNES gives natural gradients: the Fisher matrix of this
distribution is diagonal, 1 / s^2 for the mean and 2 for log_scale, and SNES multiplies the gradient
by its inverse. If n elements share a scale, its derivative is the sum of theirs, and its Fisher
matrix is 2 n. The expectation of the mean's gradient in GuidedES is C g, where C is the covariance
of its directions. That is a descent direction, though not g, with less variance if the subspace
contains the gradient.

References:
    F. Sehnke et al., Parameter-exploring policy gradients, Neural Networks 23, 2010

    D. Wierstra et al., Natural evolution strategies, JMLR 15, 2014 (separable NES)

    N. Maheswaranathan et al., Guided evolutionary strategies, ICML 2019,
    https://arxiv.org/abs/1806.10230
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import Directions, Gaussian, Guided, draw_seed
from torchopt.diff.zero_order.engine import ZeroOrder
from torchopt.diff.zero_order.error_bars import GradientEstimate, Spread, effective_sample_size
from torchopt.diff.zero_order.evaluate import ENTRIES_PER_CHUNK
from torchopt.diff.zero_order.precision import accumulator, warn_of_lost_perturbations, widened
from torchopt.diff.zero_order.refusals import require_plain
from torchopt.diff.zero_order.utilities import nes_utilities
from torchopt.linear_solve.layout import Layout
from torchopt.shown import Described
from torchopt.tree import prefix_leaves, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torchopt.tree_function import uncompiled

__all__ = ["PGPE", "SNES", "GuidedES", "SearchDistribution"]

Pull = Callable[[Tensor], Any]


class SearchDistribution(NamedTuple):
    """A normal distribution over trees, with independent elements.

    Attributes:
        mean: A tree of floating-point tensors.
        log_scale: The logarithm of the standard deviation, which has the unit of the mean. It is a
            tree that is a prefix of the mean, with tensors that broadcast to its leaves, so
            elements and leaves may share a scale.

    Example:
        >>> search = SearchDistribution.around({"w": torch.zeros(2)}, 0.5)
        >>> search.log_scale["w"].exp()
        tensor([0.5000, 0.5000])
    """

    mean: Any
    log_scale: Any

    @staticmethod
    def around(mean: Any, scale: float) -> SearchDistribution:
        """Return a distribution with a scale for each element, all of one initial value.

        Args:
            mean: A tree of floating-point tensors, which are copied.
            scale: The standard deviation, > 0.

        Raises:
            ValueError: `scale` is not positive.
        """
        if not scale > 0:
            raise ValueError(f"scale: expected a number > 0, got {scale}")
        log_scale = tree_map(lambda x: torch.full_like(x, scale).log(), mean)
        return SearchDistribution(tree_map(torch.clone, mean), log_scale)


@dataclass(frozen=True)
class _Search(Described):
    """An estimator of the gradient of an expected loss with respect to a distribution.

    Attributes:
        num_samples: N, the number of directions, >= 2.
        utility: Maps all losses to utilities of the same shape, small for small losses, such as
            `centered_ranks`; the gradient is then that of the utilities. None: the losses.
        generator: The generator that seeds are drawn from; None: torch's CPU generator.
        chunk_size: How many directions are evaluated together, as in `zero_order`.
        vectorized: As in `zero_order`.
    """

    num_samples: int
    utility: Callable[[Tensor], Tensor] | None = None
    generator: torch.Generator | None = None
    chunk_size: int | None = None
    vectorized: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_samples, bool) or not isinstance(self.num_samples, int):
            raise TypeError(f"num_samples: expected an integer, got {self.num_samples!r}")
        if self.num_samples < 2:
            raise ValueError(
                "num_samples: expected at least 2, each of which is compared with the others, got "
                f"{self.num_samples}"
            )

    method: ClassVar[str] = "antithetic"

    @property
    def directions(self) -> Directions:
        """The source of the directions z."""
        return Gaussian()

    @uncompiled
    @torch.no_grad()
    def estimate(
        self,
        fn: Callable[..., Any],
        distribution: SearchDistribution,
        *args: Any,
        seed: int | None = None,
        with_error: bool = True,
    ) -> GradientEstimate:
        """Return the estimated gradient of E fn(x, *args) with its error bars.

        Args:
            fn: Maps a tree like the mean to a 0-dim loss. It runs under `torch.func.vmap` or in a
                loop, as in `zero_order`.
            distribution: The distribution of x.
            *args: Further arguments of `fn`, which are not perturbed.
            seed: Determines the directions; None: drawn from `generator`.
            with_error: Whether to estimate the standard error.

        Returns:
            The estimate, whose `gradient` and `standard_error` are `SearchDistribution`s.

        Raises:
            NotDifferentiableError: An enclosing transform differentiates an argument.
            TypeError: The mean has a leaf that is not a floating-point tensor.
            ValueError: The scales do not broadcast to the mean.
        """
        name = type(self).__name__
        if not isinstance(distribution, SearchDistribution):
            raise TypeError(
                f"{name}: distribution: expected a SearchDistribution, got "
                f"{type(distribution).__name__}; make one by SearchDistribution.around(mean, scale)"
            )
        require_plain((distribution, args), name)
        seed = draw_seed(self.generator) if seed is None else seed
        layout = Layout.of(distribution.mean, f"{name}: mean", real=True)
        if layout.is_paired:
            raise TypeError(f"{name}: mean: expected real numbers, got complex ones")
        origin = layout.ravel(tree_map(torch.zeros_like, distribution.mean))
        center = layout.ravel(distribution.mean)
        pull, scales = _scales(distribution, layout, origin, name)
        _warn_of_lost_perturbations(distribution.mean, layout, scales)
        engine = ZeroOrder(
            self.directions, self.method, num_samples=self.num_samples, chunk_size=self.chunk_size,
            vectorized=self.vectorized,
        )  # fmt: skip

        def at(z: Tensor, *args: Any) -> Any:
            return fn(layout.unravel(center + scales * z), *args)

        losses = engine.losses(at, origin, *args, seed=seed)
        values = losses if self.utility is None else self.utility(losses)
        dtype = accumulator(torch.promote_types(values.dtype, origin.dtype))
        slopes, levels = self.weights(values.to(dtype))
        logs, spec = tree_flatten(distribution.log_scale)
        total = [torch.zeros_like(x, dtype=dtype) for x in (origin, *logs)]
        spread = Spread(total, 1, self.num_samples) if with_error else None
        rows = max(1, ENTRIES_PER_CHUNK // max(1, layout.size))
        for start in range(0, self.num_samples, rows):
            stop = min(start + rows, self.num_samples)
            z = self.directions.draw([origin], seed, start, stop)[0].to(dtype)
            parts = (self.mean_part(z, scales.to(z)), *self.scale_parts(z, pull, origin))
            for k, part in enumerate(parts):
                weights, part = (slopes if k == 0 else levels)[start:stop], part.to(dtype)
                total[k] += torch.tensordot(weights, part, dims=1) / self.num_samples
                if spread is not None:
                    spread.add(k, weights, part)

        def named(leaves: list[Tensor]) -> SearchDistribution:
            log_scale = [x.to(like.dtype) for x, like in zip(leaves[1:], logs)]
            mean = layout.unravel(leaves[0].to(origin.dtype))
            return SearchDistribution(mean, tree_unflatten(spec, log_scale))

        error = None if spread is None else spread.standard_error(total)
        bars = None if error is None else named(error)
        return GradientEstimate(named(total), bars, effective_sample_size(slopes), losses.numel())

    def weights(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the parts for the mean and for the scale, each `[N]`."""
        return (values[:, 0] - values[:, 1]) / 2, _against_others(values.mean(1))

    def mean_part(self, z: Tensor, scales: Tensor) -> Tensor:
        """Return the terms that are weighted for the mean, `[n, D]`: z / s."""
        return z / scales

    def scale_parts(self, z: Tensor, pull: Pull, origin: Tensor) -> list[Tensor]:
        """Return the terms that are weighted for each leaf of log_scale, `[n, *shape]`."""
        del origin
        return tree_leaves(torch.func.vmap(pull)(z * z - 1))


def _against_others(values: Tensor) -> Tensor:
    """Return each value minus the mean of the others."""
    n = len(values)
    return (values - values.mean()) * (n / (n - 1))


def _warn_of_lost_perturbations(mean: Any, layout: Layout, scales: Tensor) -> None:
    leaves, places = tree_leaves(mean), layout.spec.accessors()
    sizes = [s.reshape(x.shape) for s, x in zip(scales.split(layout.sizes), leaves)]
    warn_of_lost_perturbations(
        leaves, sizes, True, lambda k: places[k].codify("mean"), "exp(log_scale)"
    )


def _scales(
    distribution: SearchDistribution, layout: Layout, like: Tensor, name: str
) -> tuple[Pull, Tensor]:
    """Return a function that sums a vector over elements of one scale, and the scales, `[D]`."""
    leaves, spec = tree_flatten(distribution.log_scale)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            got = leaf.dtype if isinstance(leaf, Tensor) else repr(leaf)
            raise TypeError(f"{name}: log_scale: expected floating-point tensors, got {got}")

    def spread(leaves: list[Tensor]) -> Tensor:
        tree, what = tree_unflatten(spec, leaves), f"{name}: log_scale"
        found = [x for x in prefix_leaves(tree, layout.unravel(like), what) if x is not None]
        if len(found) < len(layout.shapes) or not all(isinstance(x, Tensor) for x in found):
            raise ValueError(
                f"{name}: log_scale: expected tensors for leaves of the mean, got a tree below one"
            )
        try:
            return layout.join([x.expand(shape) for x, shape in zip(found, layout.shapes)])
        except RuntimeError as error:
            raise ValueError(
                f"{name}: log_scale: expected tensors that broadcast to the leaves of the mean, "
                f"{[tuple(x) for x in layout.shapes][:4]}, "
                f"got {[tuple(x.shape) for x in found][:4]}"
            ) from error

    logs, pull, *_ = torch.func.vjp(spread, [widened(x.detach()) for x in leaves])
    return lambda v: pull(v.to(logs.dtype))[0], torch.exp(logs)


@dataclass(frozen=True, repr=False)
class PGPE(_Search):
    """Parameter-exploring policy gradients by mirrored pairs, unbiased for mean and log_scale.

    For a linear f with gradient a, the gradient for the mean has the variance |s a|^2 / s_i^2 +
    a_i^2 for each pair, and that for log_scale has variance zero.

    Attributes:
        num_samples: N, the number of pairs, >= 2.

    References:
        Sehnke et al., Parameter-exploring policy gradients, 2010; here with a leave-one-out
        baseline instead of a moving one, and with the logarithm of the scale.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff.zero_order.search import PGPE, SearchDistribution
        >>> _ = torch.manual_seed(0)
        >>> target = torch.tensor([1.0, -2.0])
        >>> search = SearchDistribution.around(torch.zeros(2), 0.5)
        >>> optimizer = torchopt.adam(0.05)
        >>> state = optimizer.init(search)
        >>> for _ in range(200):
        ...     found = PGPE(20).estimate(lambda x: ((x - target) ** 2).sum(), search)
        ...     updates, state = optimizer.update(found.gradient, state)
        ...     search = torchopt.apply_updates(search, updates)
        >>> bool((search.mean - target).abs().max() < 0.05)
        True
        >>> bool((search.log_scale.exp() < 0.1).all())  # the search has converged
        True
    """


@dataclass(frozen=True, repr=False)
class SNES(_Search):
    """Separable natural evolution strategies: natural gradients for mean and log_scale.

    The gradient is a mean over the samples. `nes_utilities` already contain the factor 1/N, so with
    them it is the sum. Then plain SGD with step 1 for the mean and (3 + log D) / (5 sqrt(D)) for
    log_scale is the algorithm of the paper, which multiplies s by exp(step / 2 * sum).

    Attributes:
        num_samples: N, the number of evaluations, >= 2.

    References:
        Wierstra et al., Natural evolution strategies, 2014: separable NES.

    Example:
        >>> import torch, torchopt
        >>> from torchopt.diff.zero_order.estimators import nes_utilities
        >>> from torchopt.diff.zero_order.search import SNES, SearchDistribution
        >>> _ = torch.manual_seed(0)
        >>> steps = {"mean": torchopt.sgd(1.0), "scale": torchopt.sgd(0.5)}
        >>> optimizer = torchopt.transform.partition(steps, SearchDistribution("mean", "scale"))
        >>> search = SearchDistribution.around(torch.tensor([3.0, -2.0]), 1.0)
        >>> state = optimizer.init(search)
        >>> for _ in range(100):
        ...     loss = lambda x: x[0] ** 2 + 1e4 * x[1] ** 2
        ...     found = SNES(20, nes_utilities).estimate(loss, search)
        ...     updates, state = optimizer.update(found.gradient, state, params=search)
        ...     search = torchopt.apply_updates(search, updates)
        >>> bool(loss(search.mean) < 1e-6)
        True
    """

    method: ClassVar[str] = "naive"

    def weights(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of the parts for the mean and for the scale, each `[N]`."""
        level = values[:, 0]
        is_sum = self.utility is nes_utilities  # they contain the factor 1/N of the mean
        level = level * len(level) if is_sum else _against_others(level)
        return level, level

    def mean_part(self, z: Tensor, scales: Tensor) -> Tensor:
        """Return s z, the inverse of the Fisher matrix times z / s."""
        return z * scales

    def scale_parts(self, z: Tensor, pull: Pull, origin: Tensor) -> list[Tensor]:
        """Return (z^2 - 1) / 2, averaged over elements that share a scale."""
        counts = tree_leaves(pull(torch.ones_like(origin)))
        parts = super().scale_parts(z, pull, origin)
        return [part / (2 * count.clamp(min=1)) for part, count in zip(parts, counts)]


@dataclass(frozen=True, repr=False)
class GuidedES(_Search):
    """Guided evolution strategies: mirrored pairs along a subspace, with one scale.

    The directions are those of `Guided`, of covariance C = alpha I + (1 - alpha) (D / k) U U'. The
    gradient for the mean has the expectation C g; the gradient for log_scale is unbiased.

    Attributes:
        num_samples: N, the number of pairs, >= 2.
        subspace: `[D, k]`, whose columns span the subspace, such as flattened surrogate gradients.
        alpha: The share of the variance that is isotropic, in (0, 1].

    References:
        Maheswaranathan et al., Guided evolutionary strategies, 2019, whose covariance is C / D.

    Example:
        >>> import torch
        >>> from torchopt.diff.zero_order.search import GuidedES, SearchDistribution
        >>> surrogate = torch.tensor([[1.0], [0.5], [0.0]])  # close to the gradient
        >>> search = SearchDistribution(torch.zeros(3), torch.tensor(-2.0))  # one scale
        >>> found = GuidedES(10, subspace=surrogate).estimate(lambda x: 2 * x[0] + x[1], search)
        >>> found.gradient.log_scale.shape
        torch.Size([])
    """

    subspace: Tensor = field(kw_only=True)
    alpha: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.directions  # raises for an invalid subspace or alpha

    @property
    def directions(self) -> Guided:
        """The source of the directions z."""
        return Guided(self.subspace, self.alpha)

    def scale_parts(self, z: Tensor, pull: Pull, origin: Tensor) -> list[Tensor]:
        """Return z'C^-1 z - D."""
        counts = tree_leaves(pull(torch.ones_like(origin)))
        if len(counts) != 1 or counts[0].ndim:
            raise ValueError(
                "GuidedES: log_scale: expected one 0-dim tensor, the scale of all elements, got "
                f"{len(counts)} tensors, the first of shape {tuple(counts[0].shape)}"
            )
        return [(z * self.directions.precision(z)).sum(1) - z.shape[1]]
