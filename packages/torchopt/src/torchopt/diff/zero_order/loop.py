# SPDX-License-Identifier: Apache-2.0
"""The loop of every estimate: draw, evaluate, weigh, sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from torchopt.diff.zero_order.estimators import Evaluations
from torchopt.diff.zero_order.precision import widened

__all__ = ["Space", "sum_over_directions"]


class Space(Protocol):
    """Where directions are drawn, a chunk at a time, and what is evaluated along them.

    Attributes:
        chunks: Ranges of directions that are held at once.
        coupled: How many consecutive directions depend on one another.
        sigma: Size of the perturbation.
    """

    @property
    def chunks(self) -> Sequence[tuple[int, int]]: ...  # noqa: D102 - above

    @property
    def coupled(self) -> int: ...  # noqa: D102 - above

    @property
    def sigma(self) -> float: ...  # noqa: D102 - above

    def draw(self, start: int, stop: int) -> Any:
        """Return directions `start` to `stop - 1`, the same ones in each call."""

    def evaluate(self, noise: Any) -> Tensor:
        """Return the losses along directions, `[n, K]`; of a shaped output `[n, K, *shape]`."""

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
    """Hand `add` the coefficients and the directions of each chunk.

    One pass over the directions if each coefficient depends only on its own losses. Otherwise two,
    losses and then sums, for which the directions are drawn again: memory is O(chunk D + N), never
    O(N D).

    Args:
        space: Where to draw and evaluate.
        weigh: From the losses to a coefficient for each direction, `[n]`.
        add: Called with the coefficients and the directions of a chunk, in order.
        center: The loss at the point itself, for a `weigh` that uses it.
        losses: `[N, K]`, where they are known: nothing is evaluated.
        local: Whether `weigh` may be given a chunk at a time.
        uses_norms: Whether `weigh` uses the norms of directions.
    """
    chunks = space.chunks
    noise: Any = None
    losses = None if losses is None else widened(losses)

    def weights(values: Tensor, norms: Tensor) -> Tensor:
        return weigh(Evaluations(values, center, norms, space.sigma, space.coupled))

    found: list[tuple[Tensor, Tensor]] = []
    if losses is None or uses_norms:
        for start, stop in chunks:
            noise = space.draw(start, stop)
            values = space.evaluate(noise) if losses is None else losses[start:stop]
            norms = space.square_norms(noise, values) if uses_norms else values.new_empty(0)
            if local:
                add(weights(values, norms), noise)
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
        add(c[start:stop], noise)
