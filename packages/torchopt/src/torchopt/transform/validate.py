# SPDX-License-Identifier: Apache-2.0
"""Checks of hyper-parameters, made once where a transformation is built.

A tensor as a hyper-parameter is not looked at: it may be batched, on a device, or part of a graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["are_numbers", "check_at_least_zero", "check_betas", "check_fraction", "unpacked"]

Hyper = float | torch.Tensor


def are_numbers(*values: Hyper | None) -> bool:
    """Return whether none of `values` is a tensor."""
    return not any(isinstance(value, torch.Tensor) for value in values)


def check_at_least_zero(value: Hyper, what: str) -> None:
    """Raise `ValueError("Invalid {what}: {value}; ...")` unless value >= 0."""
    if _is_number(value, what) and not value >= 0.0:
        raise ValueError(f"Invalid {what}: {value}; expected a number >= 0")


def check_fraction(value: Hyper, what: str, *, closed: bool = False) -> None:
    """Raise `ValueError("Invalid {what}: {value}; ...")` unless 0 <= value < 1 (<= if `closed`)."""
    if _is_number(value, what) and not (0.0 <= value < 1.0 or (closed and value == 1.0)):
        sign = "<=" if closed else "<"
        raise ValueError(f"Invalid {what}: {value}; expected 0 <= number {sign} 1")


def _is_number(value: Hyper, what: str) -> bool:
    """Return False for a tensor; raise `TypeError` for what is neither a number nor a tensor."""
    if isinstance(value, torch.Tensor):
        return False
    if isinstance(value, (int, float)) or (
        hasattr(value, "__float__") and not getattr(value, "shape", ())
    ):
        return True
    kind = type(value).__name__
    if callable(value):
        raise TypeError(
            f"Invalid {what}: expected a number or a tensor, got a function ({kind}); a schedule "
            "goes here with torchopt.transform.inject_hyperparams(make)(..., name=schedule)"
        )
    raise TypeError(f"Invalid {what}: expected a number or a tensor, got {value!r:.80} ({kind})")


def check_betas(*betas: Hyper) -> None:
    """Raise `ValueError("Invalid beta parameter at index {i}: ...")` unless 0 <= value < 1."""
    for index, beta in enumerate(betas):
        check_fraction(beta, f"beta parameter at index {index}")


def unpacked(values: Iterable[Any], count: int, name: str) -> tuple[Any, ...]:
    """Return the `count` entries of the hyper-parameter `name`.

    Raises:
        TypeError: It has no entries.
        ValueError: It has another number of entries.
    """
    if isinstance(values, torch.Tensor) and values.dim() == 1 and len(values) == count:
        with torch.enable_grad():  # its entries follow it, also where this runs without a graph
            return tuple(values[i] for i in range(count))
    wanted = f"Invalid {name}: expected {count} numbers or 0-dim tensors"
    if isinstance(values, torch.Tensor):
        raise ValueError(f"{wanted}, got a tensor of shape {tuple(values.shape)}")
    if isinstance(values, str) or not isinstance(values, Iterable):
        pair = f"{name}=({', '.join([repr(values)] * count)})" if _is_float(values) else "a tuple"
        raise TypeError(f"{wanted}, got {values!r:.80} ({type(values).__name__}); pass {pair}")
    entries = tuple(values)
    if len(entries) != count:
        shown = ", ".join(_shown(entry) for entry in entries[:4])
        raise ValueError(f"{wanted}, got {len(entries)}: ({shown}{', ...' * (len(entries) > 4)})")
    return entries


def _is_float(value: Any) -> bool:
    return isinstance(value, (int, float))


def _shown(value: Any) -> str:
    return f"{value!r:.20}" if _is_float(value) else type(value).__name__
