# SPDX-License-Identifier: Apache-2.0
"""Evaluate a function at many points."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchopt.diff.zero_order.directions import common_draws

__all__ = ["Evaluator"]

# A vmap takes points of about this many entries together, but not fewer than so many points: its
# intermediate results then stay in the caches of the processor, and a call of it costs little.
ENTRIES, LEAST_ROWS = 2**20, 32


@dataclass
class Evaluator:
    """Calls a function at many points, by `torch.func.vmap` or in a loop.

    Random draws inside the function (dropout) start from the same seed in every evaluation, so the
    losses differ only by the perturbation.

    Attributes:
        vectorized: True: by vmap, whose errors are raised. False: in a loop. None: by vmap; if the
            function runs in a loop but not under vmap, warn once and use the loop.
    """

    vectorized: bool | None = None

    def __call__(
        self,
        fn: Callable[..., Tensor],
        points: Sequence[Tensor],
        scratch: Sequence[Tensor],
        seed: int,
    ) -> Tensor:
        """Return `fn(*leaves, *scratch)` at each point, stacked.

        Args:
            fn: Returns a tensor of the same shape at every point.
            points: One tensor `[n, *shape]` for each leaf.
            scratch: Tensors that `fn` may overwrite; each evaluation gets copies.
            seed: The seed of random draws inside `fn`.

        Returns:
            `[n, *shape of the output]`.
        """
        if self.vectorized is False:
            return self._loop(fn, points, scratch, seed)
        try:
            return self._vmap(fn, points, scratch, seed)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            if self.vectorized or isinstance(error, torch.OutOfMemoryError):
                raise
            losses = self._loop(
                fn, points, scratch, seed
            )  # raises the error of the function itself
            first = str(error).strip().partition("\n")[0]
            warnings.warn(
                "zero-order estimation: torch.func.vmap cannot take this function, so it is "
                f"evaluated in a loop, one sample after the other. vmap says: {first} "
                "Pass vectorized=False to accept the loop, vectorized=True to get the full error.",
                UserWarning,
                stacklevel=2,
            )
            self.vectorized = False
            return losses

    @staticmethod
    def _vmap(
        fn: Callable[..., Tensor], points: Sequence[Tensor], scratch: Sequence[Tensor], seed: int
    ) -> Tensor:
        n = len(points[0])
        entries = sum(x[0].numel() for x in points) + sum(x.numel() for x in scratch)
        most = max(LEAST_ROWS, ENTRIES // max(1, entries))
        rows = -(-n // -(-n // most))  # about equally many in each
        batched = torch.func.vmap(fn, randomness="same")
        losses: list[Tensor] = []
        with common_draws(seed, points) as seed_all:
            for parts in zip(*(x.split(rows) for x in points)):
                if losses:
                    seed_all(seed)
                copies = [x.expand(len(parts[0]), *x.shape).clone() for x in scratch]
                losses.append(batched(*parts, *copies))
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    @staticmethod
    def _loop(
        fn: Callable[..., Tensor], points: Sequence[Tensor], scratch: Sequence[Tensor], seed: int
    ) -> Tensor:
        losses = []
        with common_draws(seed, points) as seed_all:
            for row in zip(*points):
                seed_all(seed)
                losses.append(fn(*row, *(x.clone() for x in scratch)))
        return torch.stack(losses)
