# SPDX-License-Identifier: Apache-2.0
"""Evolution strategies for the parameters of an inner loop, one window of steps at a time.

An inner loop runs T steps, s_t = step(theta, s_{t-1}), with losses L_t. Each estimator is a pair
`(init, estimate)`: `estimate(params, state)` runs the next window of K steps for N antithetic pairs
of particles and returns the gradient of that window's losses, summed over its steps. The estimates
of the T / K windows of an episode add up to an estimate of the gradient of sum_t L_t.

Let z_i,w be the direction of pair i in window w, and L+_i, L-_i the losses of its two particles in
the window. Then

    g_w = 1 / (2 sigma N) sum_i (L+_i - L-_i) xi_i

| estimator | direction in window w | xi | starts the window from | bias |
|---|---|---|---|---|
| `full_es` | one window, K = T | z | the start | smoothing only |
| `truncated_es` | new | z_w | the unperturbed state | ignores earlier windows |
| `persistent_es` (PES) | new | z_1 + ... + z_w | its own state | smoothing only |
| `noise_reuse_es` (NRES) | the same in all windows | z | its own state | smoothing only |

PES and NRES are unbiased for the (smoothed) gradient if theta does not change within an episode. If
theta is updated between windows, their error is of the order of the update. The variance of PES
grows with the number of windows, that of NRES does not. For a loss L_t = a theta of one parameter
and K = 1, the variances of g_w are (w + 1) a^2 and 2 a^2 for each pair.

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

from torchopt.diff.call_state import CallState
from torchopt.diff.zero_order.directions import (
    Directions,
    Gaussian,
    common_draws,
    draw_seed,
    member_seed,
)
from torchopt.diff.zero_order.error_bars import GradientEstimate, Spread, effective_sample_size
from torchopt.diff.zero_order.layout import Layout
from torchopt.diff.zero_order.precision import (
    accumulator,
    require_sigma,
    warn_of_lost_perturbations,
    widened,
)
from torchopt.diff.zero_order.refusals import require_plain
from torchopt.shown import Described
from torchopt.tree import tree_map
from torchopt.tree_function import uncompiled

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
class InnerLoop(Described):
    """The inner loop whose losses are minimized.

    Attributes:
        start: Maps params to the first state, a tree of tensors.
        step: Maps params, state and t (int, from 0) to the next state and a 0-dim loss, which may
            be an integer or a bool. It runs under vmap; its random draws are common to all
            particles.
        horizon: T, the number of steps of an episode.
    """

    start: Callable[[Any], Any]
    step: Callable[[Any, Any, int], tuple[Any, Tensor]]
    horizon: int


class ParticleState(NamedTuple):
    """The state of the particles.

    Attributes:
        seed: Determines all directions.
        window: How many windows were estimated so far, in all episodes.
        inner: The inner states: one for truncated_es, otherwise with leaves `[2 N, ...]`, the N
            particles at +z before those at -z; None at the start of an episode.
        xi: The sum of the directions of this episode, `[N, *shape]` for each leaf of params, in
            float32 or wider.
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
    """Return evolution strategies for whole episodes: each estimate runs all T steps.

    Args:
        loop: The inner loop.
        num_pairs: N, the number of antithetic pairs of particles, >= 1.
        sigma: The size of the perturbation, > 0, in the units of the parameters.
        directions: The source of the directions; None: Gaussian.

    Raises:
        ValueError: An option is out of its range.

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
    """Return evolution strategies that are biased: they ignore effects beyond a window.

    Args:
        loop: The inner loop.
        window: K, the number of steps of a window, a divisor of the horizon T.
        num_pairs: As in `full_es`.
        sigma: As in `full_es`.
        directions: As in `full_es`.

    Raises:
        ValueError: An option is out of its range, or `window` does not divide the horizon.

    Example:
        >>> from torchopt.diff.zero_order.directions import Rademacher
        >>> loop = InnerLoop(lambda p: torch.zeros_like(p), lambda p, s, t: (s + p, s + p), 4)
        >>> es = truncated_es(loop, window=2, num_pairs=2, sigma=0.1, directions=Rademacher())
        >>> theta = torch.tensor(1.0, dtype=torch.float64)
        >>> first, state = es.estimate(theta, es.init(theta, seed=0))
        >>> second, _ = es.estimate(theta, state)
        >>> round((first.gradient + second.gradient).item(), 6)  # 1 + 2, twice; the exact sum is 10
        6.0
    """
    return _pair("fresh", loop, window, num_pairs, sigma, directions)


def persistent_es(
    loop: InnerLoop,
    *,
    window: int,
    num_pairs: int,
    sigma: float,
    directions: Directions | None = None,
) -> UnrolledEstimator:
    """Return persistent evolution strategies: each window draws new directions and adds them up.

    Arguments and errors are those of `truncated_es`.

    Example:
        >>> loop = InnerLoop(lambda p: torch.zeros_like(p), lambda p, s, t: (s + p, s + p), 4)
        >>> es = persistent_es(loop, window=2, num_pairs=1000, sigma=0.1)
        >>> theta = torch.tensor(1.0, dtype=torch.float64)
        >>> first, state = es.estimate(theta, es.init(theta, seed=0))
        >>> second, _ = es.estimate(theta, state)
        >>> abs((first.gradient + second.gradient).item() - 10) < 2  # 1 + 2 + 3 + 4
        True
    """
    return _pair("sum", loop, window, num_pairs, sigma, directions)


def noise_reuse_es(
    loop: InnerLoop,
    *,
    window: int,
    num_pairs: int,
    sigma: float,
    directions: Directions | None = None,
) -> UnrolledEstimator:
    """Return noise-reuse evolution strategies: a pair keeps one direction for an episode.

    Arguments and errors are those of `truncated_es`.

    Example:
        >>> from torchopt.diff.zero_order.directions import Rademacher
        >>> loop = InnerLoop(lambda p: torch.zeros_like(p), lambda p, s, t: (s + p, s + p), 4)
        >>> es = noise_reuse_es(loop, window=2, num_pairs=2, sigma=0.1, directions=Rademacher())
        >>> theta = torch.tensor(1.0, dtype=torch.float64)
        >>> first, state = es.estimate(theta, es.init(theta, seed=0))
        >>> second, _ = es.estimate(theta, state)
        >>> round((first.gradient + second.gradient).item(), 6)  # 1 + 2 + 3 + 4
        10.0
    """
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
    require_sigma(sigma)
    source = Gaussian() if directions is None else directions
    per_episode = loop.horizon // window

    def init(params: Any, seed: int | None = None) -> ParticleState:
        del params
        return ParticleState(draw_seed() if seed is None else seed, 0, None, ())

    @uncompiled
    @torch.no_grad()
    def estimate(params: Any, state: ParticleState) -> tuple[GradientEstimate, ParticleState]:
        require_plain(params, "unrolled")
        layout = _layout(params)
        leaves = [x.detach() for x in layout.leaves]
        warn_of_lost_perturbations(leaves, sigma, source.standard_normal, layout.name)
        episode, position = divmod(state.window, per_episode)
        family = state.window if kind != "reuse" else episode
        z = source.draw(leaves, member_seed(state.seed, family), 0, num_pairs)
        xi = [x.to(accumulator(x.dtype)) for x in z]
        if kind == "sum" and position > 0:
            xi = [x + y for x, y in zip(state.xi, xi)]
        points = [
            torch.cat([torch.add(x, y, alpha=sigma), torch.sub(x, y, alpha=sigma)])
            for x, y in zip(leaves, z)
        ]

        def start(leaves: Sequence[Tensor]) -> Any:
            return loop.start(layout.tree(leaves))

        def run(leaves: Sequence[Tensor], inner: Any) -> tuple[Any, Tensor]:
            theta = layout.tree(leaves)
            total = torch.zeros((), device="cpu")
            for t in range(position * window, (position + 1) * window):
                inner, loss = loop.step(theta, inner, t)
                total = total + _checked(loss)
            return inner, total

        def draws(stage: int) -> Any:
            # Random draws inside the loop are common to all particles and new in each window. The
            # start has a stream of its own, so that every run of a window gets the same numbers.
            seed = member_seed(state.seed ^ 0x5DEECE66D ^ stage, state.window)
            return common_draws(seed, leaves)

        inner = state.inner
        shared = None if kind == "fresh" else 0  # one inner state, or one for each particle
        if inner is None:
            with draws(1):
                each = torch.func.vmap(start, randomness="same")
                inner = start(leaves) if kind == "fresh" else each(points)
        steps = 2 * num_pairs * window
        found = CallState(loop)  # the unperturbed state must run in the same surroundings
        with draws(0):
            batched = torch.func.vmap(run, in_dims=(0, shared), randomness="same")
            following, losses = batched(points, inner)
        if kind == "fresh":
            found.reset()
            with draws(0):
                following, _ = run(leaves, inner)
            steps += window
        coupled = source.coupled(sum(x.numel() for x in leaves))
        means, errors, effective = _gradient(losses, xi, sigma, coupled)
        gradient, error = (
            None if tree is None else layout.gradient([y.to(x) for x, y in zip(leaves, tree)])
            for tree in (means, errors)
        )
        last = position + 1 == per_episode
        return GradientEstimate(gradient, error, effective, steps), ParticleState(
            state.seed,
            state.window + 1,
            None if last else tree_map(_detached, following),
            () if last or kind != "sum" else tuple(xi),
        )

    return UnrolledEstimator(init, estimate)


def _layout(params: Any) -> Layout:
    layout = Layout(params)
    if not layout.leaves:
        raise ValueError(
            "`params`: expected a tree with floating-point or complex tensors, found none."
        )
    return layout


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"`step`: expected a 0-dim tensor as the loss, got {got}.")
    return widened(loss)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _gradient(
    losses: Tensor, xi: Sequence[Tensor], sigma: float, coupled: int
) -> tuple[list[Tensor], list[Tensor] | None, float]:
    """Return the gradient, its standard error and the effective sample size."""
    plus, minus = losses.chunk(2)
    c = (plus - minus) / (2.0 * sigma)
    means = [torch.tensordot(c.to(x), x, dims=1) / len(c) for x in xi]
    spread = Spread(means, coupled, len(c))
    for k, x in enumerate(xi):
        spread.add(k, c.to(x), x)
    return means, spread.standard_error(means), effective_sample_size(c)
