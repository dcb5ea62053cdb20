# SPDX-License-Identifier: Apache-2.0
"""What an engine of differentiation is: a value that turns a function into a differentiable one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

__all__ = ["Engine"]


@runtime_checkable
class Engine(Protocol):
    """A way to differentiate a function, as a value with fields.

    Comparing engines is a loop over values: each takes the function and returns one with the same
    signature and the same results, whose derivatives are those of the engine.
    """

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with the derivatives of this engine."""
