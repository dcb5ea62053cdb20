# SPDX-License-Identifier: Apache-2.0
"""Hyper-parameters as fields of rules, and their checks, which run when a rule is made.

Tensors are not checked: they may be batched, on a device, or part of a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from torchopt.shown import shown

__all__ = [
    "Hyper",
    "are_numbers",
    "at_least_one",
    "at_least_zero",
    "check",
    "fraction",
    "number",
    "positive",
    "require_params",
    "unpacked",
    "within",
]

#: A hyper-parameter: a number, or a tensor that is read in each step.
Hyper = float | torch.Tensor

_NONE: Any = dataclasses.MISSING


def number(
    default: Any = _NONE, check: Callable[[Any], None] | None = None, *, starts: str = ""
) -> Any:
    """Declare a hyper-parameter of a rule.

    Args:
        default: Its default; by default it has none.
        check: A function that raises for numbers that are out of range.
        starts: The field of the state of which it is the initial value; it is then not used in
            steps.
    """
    return dataclasses.field(
        default=default, metadata={"check": check, "starts": starts, "shown": True}
    )


def within(
    expected: str, what: str, default: Any = _NONE, *, starts: str = "", optional: bool = False
) -> Any:
    """Declare a hyper-parameter in a range.

    Args:
        expected: A key of `RANGES`.
        what: Its name in messages.
        default: Its default, if it has one.
        starts: See `number`.
        optional: Whether None stands for none.
    """
    inside = partial(check, expected=expected, what=what, optional=optional)
    return number(default, inside, starts=starts)


def at_least_zero(what: str, default: Any = _NONE, *, starts: str = "") -> Any:
    """Declare a hyper-parameter >= 0; `what` is its name in messages."""
    return within("a number >= 0", what, default, starts=starts)


def at_least_one(what: str, default: Any = _NONE, *, optional: bool = False) -> Any:
    """Declare a count >= 1, or None if `optional`; `what` is its name in messages."""
    return within("an integer >= 1", what, default, optional=optional)


def positive(what: str, default: Any = _NONE) -> Any:
    """Declare a hyper-parameter > 0; `what` is its name in messages."""
    return within("a number > 0", what, default)


def fraction(what: str, default: Any = _NONE, *, closed: bool = False) -> Any:
    """Declare a hyper-parameter in [0, 1), or in [0, 1] when `closed`."""
    return within("0 <= number <= 1" if closed else "0 <= number < 1", what, default)


def are_numbers(*values: Hyper | None) -> bool:
    """Return whether none of `values` is a tensor."""
    return not any(isinstance(value, torch.Tensor) for value in values)


#: Ranges by what messages say of them.
RANGES: dict[str, Callable[[Any], bool]] = {
    "a number >= 0": lambda x: x >= 0,
    "a number > 0": lambda x: x > 0,
    "a number <= 0": lambda x: x <= 0,
    "a number > 1": lambda x: x > 1,
    "0 < number < 1": lambda x: 0 < x < 1,
    "0 <= number < 1": lambda x: 0 <= x < 1,
    "0 <= number <= 1": lambda x: 0 <= x <= 1,
    "an integer >= 0": lambda x: hasattr(x, "__index__") and x >= 0,
    "an integer >= 1": lambda x: hasattr(x, "__index__") and x >= 1,
}


def check(value: Hyper | None, expected: str, what: str, *, optional: bool = False) -> None:
    """Raise `ValueError("Invalid {what}: {value}; ...")` for a number out of range."""
    if optional and value is None:
        return
    if _is_number(value, what) and not RANGES[expected](value):
        raise ValueError(f"Invalid {what}: {value}; expected {expected}")


def _is_number(value: Hyper | None, what: str) -> bool:
    """Return whether `value` is a number and not a tensor; raise `TypeError` if it is neither."""
    if isinstance(value, torch.Tensor):
        return False
    if isinstance(value, (int, float)) or (
        hasattr(value, "__float__") and not getattr(value, "shape", ())
    ):
        return True
    kind = type(value).__name__
    if isinstance(value, (Iterator, list, dict)):
        raise TypeError(
            f"Invalid {what}: expected a number or a tensor, got {kind}; parameters go to "
            "init(params), or to a class such as torchopt.Adam(params, lr)"
        )
    if callable(value):
        raise TypeError(
            f"Invalid {what}: expected a number or a tensor, got a function ({kind}); a schedule "
            "goes here with torchopt.transform.inject_hyperparams(make)(..., name=schedule)"
        )
    if hasattr(value, "get_last_lr"):
        raise TypeError(
            f"Invalid {what}: expected a number or a tensor, got {kind} of torch; pass one of "
            "torchopt.schedule, or step torchopt.optim.TorchOptimizer, which takes such schedulers"
        )
    raise TypeError(f"Invalid {what}: expected a number or a tensor, got {shown(value)} ({kind})")


def require_params(params: Any, what: str) -> None:
    """Raise AssertionError unless `update` got the parameters, which `what` needs."""
    if params is None:
        raise AssertionError(
            f"Parameters are required for {what}. "
            "Call `update(updates, state, params=params)` instead."
        )


def unpacked(values: Iterable[Any], name: str, usual: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the entries of the hyper-parameter `name`, as many as `usual`, its default, has.

    Raises:
        TypeError: `values` is not a sequence of entries.
        ValueError: The number of entries is another one.
    """
    count = len(usual)
    if isinstance(values, torch.Tensor) and values.dim() == 1 and len(values) == count:
        with torch.enable_grad():  # the entries stay connected to it, even under no_grad
            return tuple(values[i] for i in range(count))
    wanted = f"Invalid {name}: expected {count} numbers or 0-dim tensors"
    if isinstance(values, torch.Tensor):
        raise ValueError(f"{wanted}, got a tensor of shape {tuple(values.shape)}")
    if isinstance(values, str) or not isinstance(values, Iterable):
        pair = (values, *usual[1:]) if _is_float(values) else usual
        after = "; the step size is lr, the argument before betas" * (name == "betas")
        raise TypeError(
            f"{wanted}, got {shown(values)} ({type(values).__name__}); pass {name}={pair}{after}"
        )
    entries = tuple(values)
    if len(entries) != count:
        listed = ", ".join(_shown(entry) for entry in entries[:4])
        raise ValueError(f"{wanted}, got {len(entries)}: ({listed}{', ...' * (len(entries) > 4)})")
    return entries


def _is_float(value: Any) -> bool:
    return isinstance(value, (int, float))


def _shown(value: Any) -> str:
    return f"{value!r:.20}" if _is_float(value) else type(value).__name__
