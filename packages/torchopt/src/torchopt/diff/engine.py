# SPDX-License-Identifier: Apache-2.0
"""The protocol of an engine: an object that differentiates any inner problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

__all__ = ["Engine"]


@runtime_checkable
class Engine(Protocol):
    """A way to differentiate an inner loop.

    `torchopt.diff.Explicit`, `torchopt.diff.Implicit` and `torchopt.diff.ZeroOrder` are engines.
    Each takes the same problem and returns a function with the same arguments and results; only the
    derivatives differ.
    """

    def over(
        self,
        loss: Callable[..., Any],
        optimizer: Any,
        *,
        steps: int,
        tasks: Sequence[Any] | None = None,
        verify: Any = None,
    ) -> Callable[..., Any]:
        """Return a function that solves the inner problem, differentiated by this engine.

        The arguments have the same meaning as those of `torchopt.inner_loop`.

        Args:
            loss: `loss(params, batch, *meta)`, a 0-dim tensor.
            optimizer: A constructor of a transformation, or a transformation.
            steps: The number of steps, >= 1.
            tasks: The dimensions that count tasks; None: one task.
            verify: A `torchopt.diff.Verify`; None: no checks.

        Returns:
            A function of `(params, batch, *meta, batches=None, state=None, **hypers)` that returns
            an `InnerResult`.
        """
