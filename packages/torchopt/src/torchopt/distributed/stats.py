# SPDX-License-Identifier: Apache-2.0
"""Statistics of the traffic of remote calls."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.tree import tree_leaves

__all__ = ["WireStats", "count", "count_results", "nbytes", "wire_stats"]


@dataclass
class WireStats:
    """What this process has sent and received by remote calls.

    Attributes:
        calls: The number of remote calls.
        call_bytes: Bytes of functions and arguments, sent with each call.
        parameter_bytes: Bytes of shared tensors, sent once for each version and worker.
        parameter_bytes_saved: Bytes that sending shared tensors with each call would have added.
        result_bytes: Bytes of the tensors in results.
        gradient_bytes: Bytes of the gradients of shared tensors, received once for each call.
    """

    calls: int = 0
    call_bytes: int = 0
    parameter_bytes: int = 0
    parameter_bytes_saved: int = 0
    result_bytes: int = 0
    gradient_bytes: int = 0


_stats = WireStats()
_stats_lock = threading.Lock()


def count(**amounts: int) -> None:
    """Add to the attributes of these names."""
    with _stats_lock:
        for name, amount in amounts.items():
            setattr(_stats, name, getattr(_stats, name) + amount)


def wire_stats(*, reset: bool = False) -> WireStats:
    """Return what remote calls sent and received since the start, or since the last reset.

    Args:
        reset: Count from zero again.

    Example:
        >>> wire_stats(reset=True).calls
        0
    """
    global _stats
    with _stats_lock:
        result = replace(_stats)
        if reset:
            _stats = WireStats()
    return result


def count_results(results: Any) -> None:
    """Count the tensors of results that came back."""
    count(result_bytes=sum(nbytes(x) for x in tree_leaves(results) if isinstance(x, Tensor)))


def nbytes(x: Tensor) -> int:
    """Return how many bytes of a tensor are sent."""
    if x.layout != torch.strided:
        return x.numel() * x.element_size()
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
