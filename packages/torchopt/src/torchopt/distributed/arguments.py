# SPDX-License-Identifier: Apache-2.0
"""Checks of the tasks and weights of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from torchopt.errors import NotDifferentiableError

__all__ = ["checked_weights"]


def checked_weights(tasks: Any, weights: Any) -> list[float] | None:
    """Check tasks and weights, and return the weights as numbers.

    Raises:
        ValueError: There is no task, or `weights` are not one number >= 0 for each task.
        TypeError: The tasks are not a sequence.
        NotDifferentiableError: The weights require a gradient.
    """
    if isinstance(tasks, Mapping) or not (
        hasattr(tasks, "__len__") and hasattr(tasks, "__getitem__")
    ):
        advice = "the loss comes first" if callable(tasks) else "pass list(tasks)"
        raise TypeError(
            "`tasks`: expected a sequence, whose length every rank knows, got "
            f"{type(tasks).__name__}; {advice}: backward(task_loss, tasks)."
        )
    if len(tasks) == 0:
        raise ValueError("`tasks`: expected at least one task, got none.")
    if weights is None:
        return None
    if any(isinstance(w, Tensor) and w.requires_grad for w in (weights, *weights)):
        raise NotDifferentiableError(
            "`weights`: expected numbers, got tensors that require a gradient, and the weights get "
            "none; multiply the loss of each task by its weight instead."
        )
    numbers = [float(w) if isinstance(w, (Real, Tensor)) else math.nan for w in weights]
    if len(numbers) != len(tasks):
        raise ValueError(
            f"`weights`: expected one for each of {len(tasks)} tasks, got {len(numbers)}."
        )
    if not all(0.0 <= w < math.inf for w in numbers) or not sum(numbers) > 0.0:
        raise ValueError(
            f"`weights`: expected numbers >= 0, not all of them 0, got {str(weights)[:100]}."
        )
    return numbers
