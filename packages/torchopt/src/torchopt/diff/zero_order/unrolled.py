# SPDX-License-Identifier: Apache-2.0
"""Evolution strategies for the parameters of an inner loop, one window of steps at a time.

An inner loop runs T steps, s_t = step(theta, s_{t-1}), with losses L_t. Each estimator is a pair
`(init, estimate)`: `estimate(params, state)` runs the next window of K steps of N antithetic pairs
of particles and returns the gradient of that window's losses, summed over its steps. The estimates
of the T / K windows of an episode add up to an estimate of the gradient of sum_t L_t.

With z_i,w the direction of pair i in window w, and L+, L- the window's losses of its particles,

    g_w = 1 / (2 sigma N) sum_i (L+_i - L-_i) xi_i

| estimator | direction in window w | xi | starts the window from | bias |
|---|---|---|---|---|
| `full_es` | one window, K = T | z | the start | smoothing only |
| `truncated_es` | new | z_w | the unperturbed state | ignores earlier windows |
| `persistent_es` (PES) | new | z_1 + ... + z_w | its own state | smoothing only |
| `noise_reuse_es` (NRES) | the same in all windows | z | its own state | smoothing only |

PES and NRES are unbiased for the (smoothed) gradient while theta stays the same in an episode; if
theta is updated between windows, their error is of the order of the update. The variance of PES
grows with the number of windows; that of NRES does not: for a loss L_t = a theta, of one parameter,
the variances of g_w are (w + 1) a^2 and 2 a^2 for each pair (with K = 1).

References:
    P. Vicol, L. Metz, J. Sohl-Dickstein, Unbiased Gradient Estimation in Unrolled Computation
    Graphs with Persistent Evolution Strategies, ICML 2021, https://arxiv.org/abs/2112.13835
    O. Li, J. Harrison, J. Sohl-Dickstein, V. Smith, L. Metz, Variance-Reduced Gradient Estimation
    via Noise-Reuse in Online Evolution Strategies, NeurIPS 2023, https://arxiv.org/abs/2304.12180
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import (
    Directions,
    Gaussian,
    draw_seed,
    member_seed,
    seeded,
)
from torchopt.diff.zero_order.error_bars import GradientEstimate, effective_sample_size
from torchopt.tree import tree_flatten, tree_map, tree_unflatten

__all__ = [
    "InnerLoop",
    "ParticleState",
    "UnrolledEstimator",
    "full_es",
    "noise_reuse_es",
    "persistent_es",
    "truncated_es",
]


@dataclass(frozen=True)
class InnerLoop:
    """The loop whose losses are to be made small.

    Attributes:
        start: From params to the first state, a tree of tensors.
        step: From params, state and t (int, from 0) to the next state and a 0-dim loss. It runs
            under vmap; its random draws are common to all particles.
        horizon: T, steps of an episode.
    """

    start: Callable[[Any], Any]
    step: Callable[[Any, Any, int], tuple[Any, Tensor]]
    horizon: int


class ParticleState(NamedTuple):
    """Where the particles are.

    Attributes:
        seed: Names all directions.
        window: Windows estimated so far, in all episodes.
        inner: Inner states: for truncated_es one, otherwise each leaf `[2 N, ...]`, the N particles
            at +z before those at -z; None at the start of an episode.
        xi: Sum of the directions of this episode, for each leaf of params `[N, *shape]`.
    """

    seed: int
    window: int
    inner: Any
    xi: tuple[Tensor, ...]


class UnrolledEstimator(NamedTuple):
    """A pair of functions.

    Attributes:
        init: `init(params, seed=None) -> ParticleState`.
        estimate: `estimate(params, state) -> (GradientEstimate, ParticleState)`. The estimate's
            `evaluations` counts inner steps.
    """

    init: Callable[..., ParticleState]
    estimate: Callable[[Any, ParticleState], tuple[GradientEstimate, ParticleState]]


def full_es(
    loop: InnerLoop, *, num_pairs: int, sigma: float, directions: Directions | None = None
) -> UnrolledEstimator:
    """Return evolution strategies on whole episodes: each estimate runs all T steps.

    Example:
        >>> from torchopt.diff.zero_order.directions import Rademacher
        >>> loop = InnerLoop(lambda p: torch.zeros_like(p), lambda p, s, t: (s + p, s + p), 4)
        >>> es = full_es(loop, num_pairs=2, sigma=0.1, directions=Rademacher())
        >>> theta = torch.tensor(1.0, dtype=torch.float64)
        >>> result, _ = es.estimate(theta, es.init(theta, seed=0))
        >>> round(result.gradient.item(), 6)  # 1 + 2 + 3 + 4
        10.0
    """
    return _pair("sum", loop, loop.horizon, num_pairs, sigma, directions)


def truncated_es(
    loop: InnerLoop,
    *,
    window: int,
    num_pairs: int,
    sigma: float,
    directions: Directions | None = None,
) -> UnrolledEstimator:
    """Return evolution strategies that see the effect of theta within a window only: biased."""
    return _pair("fresh", loop, window, num_pairs, sigma, directions)


def persistent_es(
    loop: InnerLoop,
    *,
    window: int,
    num_pairs: int,
    sigma: float,
    directions: Directions | None = None,
) -> UnrolledEstimator:
    """Return persistent evolution strategies: new directions in each window, credited by sums."""
    return _pair("sum", loop, window, num_pairs, sigma, directions)


def noise_reuse_es(
    loop: InnerLoop,
    *,
    window: int,
    num_pairs: int,
    sigma: float,
    directions: Directions | None = None,
) -> UnrolledEstimator:
    """Return noise-reuse evolution strategies: one direction for each pair and episode."""
    return _pair("reuse", loop, window, num_pairs, sigma, directions)


def _pair(
    kind: Literal["fresh", "sum", "reuse"],
    loop: InnerLoop,
    window: int,
    num_pairs: int,
    sigma: float,
    directions: Directions | None,
) -> UnrolledEstimator:
    if window < 1 or loop.horizon % window:
        raise ValueError(
            f"`window`: expected a divisor of the horizon {loop.horizon}, got {window}."
        )
    if num_pairs < 1:
        raise ValueError(f"`num_pairs`: expected at least 1, got {num_pairs}.")
    if not 0.0 < sigma < float("inf"):
        raise ValueError(f"`sigma`: expected a positive number, got {sigma!r}.")
    source = Gaussian() if directions is None else directions
    per_episode = loop.horizon // window

    def init(params: Any, seed: int | None = None) -> ParticleState:
        del params
        return ParticleState(draw_seed() if seed is None else seed, 0, None, ())

    @torch.no_grad()
    def estimate(params: Any, state: ParticleState) -> tuple[GradientEstimate, ParticleState]:
        leaves, spec = tree_flatten(params)
        leaves = [x.detach() for x in leaves]
        episode, position = divmod(state.window, per_episode)
        family = state.window if kind != "reuse" else episode
        z = source.draw(leaves, member_seed(state.seed, family), 0, num_pairs)
        xi = z
        if kind == "sum" and position > 0:
            xi = [x + y for x, y in zip(state.xi, z)]
        points = [
            torch.cat([torch.add(x, y, alpha=sigma), torch.sub(x, y, alpha=sigma)])
            for x, y in zip(leaves, z)
        ]

        def run(leaves: Sequence[Tensor], inner: Any) -> tuple[Any, Tensor]:
            theta = tree_unflatten(spec, list(leaves))
            total: Any = 0.0
            for t in range(position * window, (position + 1) * window):
                inner, loss = loop.step(theta, inner, t)
                total = total + loss
            return inner, total

        def particle(leaves: Sequence[Tensor], inner: Any) -> tuple[Any, Tensor]:
            return run(leaves, inner)

        def particle_from_start(leaves: Sequence[Tensor]) -> tuple[Any, Tensor]:
            return run(leaves, loop.start(tree_unflatten(spec, list(leaves))))

        # Random draws inside the loop: common to all particles, new in each window.
        with seeded(member_seed(state.seed ^ 0x5DEECE66D, state.window), leaves):
            if state.inner is None and kind != "fresh":
                inner, losses = torch.func.vmap(particle_from_start, randomness="same")(points)
            elif kind == "fresh":
                start = loop.start(params) if state.inner is None else state.inner
                batched = torch.func.vmap(particle, in_dims=(0, None), randomness="same")
                _, losses = batched(points, start)
            else:
                batched = torch.func.vmap(particle, randomness="same")
                inner, losses = batched(points, state.inner)
        steps = 2 * num_pairs * window
        if kind == "fresh":
            with seeded(member_seed(state.seed ^ 0x5DEECE66D, state.window), leaves):
                inner, _ = run(leaves, start)
            steps += window
        result = _gradient(losses, xi, sigma, steps)
        last = position + 1 == per_episode
        following = ParticleState(
            state.seed,
            state.window + 1,
            None if last else tree_map(torch.Tensor.detach, inner),
            () if last or kind != "sum" else tuple(xi),
        )
        return (
            GradientEstimate(
                tree_unflatten(spec, result.gradient),
                None
                if result.standard_error is None
                else tree_unflatten(spec, result.standard_error),
                result.effective_sample_size,
                result.evaluations,
            ),
            following,
        )

    return UnrolledEstimator(init, estimate)


def _gradient(losses: Tensor, xi: Sequence[Tensor], sigma: float, steps: int) -> GradientEstimate:
    plus, minus = losses.chunk(2)
    c = (plus - minus) / (2.0 * sigma)
    n = len(c)
    gradient, error = [], []
    for x in xi:
        each = c.to(x).reshape(n, *(1,) * (x.ndim - 1)) * x
        gradient.append(each.mean(0))
        if n > 1:
            error.append(each.std(0) / n**0.5)
    effective = effective_sample_size(c)
    return GradientEstimate(gradient, error if n > 1 else None, effective, steps)
