# SPDX-License-Identifier: Apache-2.0
"""Measure the time and the error of one method."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["distance", "timed"]


def timed(call: Callable[[], Any], repeats: int) -> tuple[Any, dict[str, float]]:
    """Return the last result of a call, and the minimum and median of its processor time."""
    times = []
    for _ in range(repeats):
        started = time.process_time()
        found = call()
        times.append(time.process_time() - started)
    return found, {"seconds": min(times), "median": statistics.median(times)}


def distance(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Return the distance relative to the norm of the exact one, and the cosine with it."""
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    return {"error": ((found - exact).norm() / exact.norm()).item(), "cosine": cosine.item()}
