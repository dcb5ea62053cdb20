# SPDX-License-Identifier: Apache-2.0
"""The protocol of an engine: a value that differentiates any inner problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

__all__ = ["Engine"]


@runtime_checkable
class Engine(Protocol):
    """A way to differentiate an inner loop, as a value with fields.

    `torchopt.diff.Explicit`, `torchopt.diff.Implicit` and `torchopt.diff.ZeroOrder` are engines.
    Each takes the same problem and returns a function with the same arguments and results; only
    the derivatives differ.
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
        """Return the engine over an inner problem.

        Args:
            loss: As in `torchopt.inner_loop`.
            optimizer: As there.
            steps: As there.
            tasks: As there.
            verify: As there.

        Returns:
            A function of `(params, batch, *meta, batches=None, state=None, **hypers)` that returns
            an `InnerResult`.
        """
