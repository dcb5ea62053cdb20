# SPDX-License-Identifier: Apache-2.0
"""The loop of every estimate: draw, evaluate, weigh, sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchopt.diff.zero_order.estimators import Evaluations
from torchopt.diff.zero_order.precision import widened
from torchopt.precision import without_autocast

__all__ = ["Space", "sum_over_directions"]


class Space(Protocol):
    """The space in which directions are drawn, and the function that is evaluated along them.

    Attributes:
        chunks: The ranges of directions of the chunks.
        coupled: How many consecutive directions depend on one another.
        sigma: The size of the perturbation.
    """

    @property
    def chunks(self) -> Sequence[tuple[int, int]]: ...  # noqa: D102 - above

    @property
    def coupled(self) -> int: ...  # noqa: D102 - above

    @property
    def sigma(self) -> float: ...  # noqa: D102 - above

    def draw(self, start: int, stop: int) -> Any:
        """Return directions `start` to `stop - 1`, the same in each call."""

    def evaluate(self, noise: Any) -> Tensor:
        """Return the losses along directions, `[n, K]`, or `[n, K, *shape]` for other outputs."""

    def square_norms(self, noise: Any, like: Tensor) -> Tensor:
        """Return the squared norms of directions, `[n]`, in dtype and on the device of `like`."""


def sum_over_directions(
    space: Space,
    weigh: Callable[[Evaluations], Tensor],
    add: Callable[[Tensor, Any], None],
    *,
    center: Tensor | None = None,
    losses: Tensor | None = None,
    local: bool = False,
    uses_norms: bool = False,
) -> None:
    """Call `add` with the coefficients and the directions of each chunk.

    This takes one pass over the directions if each coefficient depends only on its own losses.
    Otherwise it takes two, one for the losses and one for the sums, and the directions are drawn
    again. Memory is O(chunk D + N), never O(N D).

    Args:
        space: The space in which directions are drawn and evaluated.
        weigh: Computes a coefficient for each direction, `[n]`, from the losses.
        add: Called with the coefficients and the directions of each chunk, in order.
        center: The loss at the point itself, if `weigh` uses it.
        losses: `[N, K]`, if they are known; then nothing is evaluated.
        local: Whether `weigh` can be called for each chunk separately.
        uses_norms: Whether `weigh` uses the norms of the directions.
    """
    chunks = space.chunks
    noise: Any = None
    losses = None if losses is None else widened(losses)

    def weights(values: Tensor, norms: Tensor) -> Tensor:
        with without_autocast():
            return weigh(Evaluations(values, center, norms, space.sigma, space.coupled))

    def added(c: Tensor, noise: Any) -> None:
        with without_autocast():
            add(c, noise)

    found: list[tuple[Tensor, Tensor]] = []
    if losses is None or uses_norms:
        for start, stop in chunks:
            noise = space.draw(start, stop)
            values = space.evaluate(noise) if losses is None else losses[start:stop]
            norms = space.square_norms(noise, values) if uses_norms else values.new_empty(0)
            if local:
                added(weights(values, norms), noise)
            else:
                found.append((values, norms))
        if local:
            return
        values, norms = (torch.cat(column) for column in zip(*found))
    else:
        values, norms = losses, losses.new_empty(0)
    c = weights(values, norms)
    for start, stop in chunks:
        if noise is None or len(chunks) > 1:
            noise = space.draw(start, stop)
        added(c[start:stop], noise)
