# SPDX-License-Identifier: Apache-2.0
"""One short line for a value, without the elements of tensors: for messages and for `repr`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor

__all__ = ["Described", "call", "described", "options", "shown"]

ATOMS = (Number, str, type(None), torch.dtype, torch.device)


def shown(value: Any) -> str:
    """Return a value as it stands in a call.

    Example:
        >>> import torch
        >>> shown({"M": torch.ones(3, 2), "loss": max, "betas": (0.9, True)})
        "{'M': tensor of shape (3, 2), 'loss': max, 'betas': (0.9, True)}"
    """
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, ATOMS):
        return repr(value)
    if type(value) is dict:
        return "{" + ", ".join(f"{key!r}: {shown(item)}" for key, item in value.items()) + "}"
    if type(value) in (list, tuple):
        inside = ", ".join(map(shown, value))
        return f"({inside})" if type(value) is tuple else f"[{inside}]"
    if isinstance(value, tuple) and hasattr(value, "init"):
        return repr(value)  # a gradient transformation
    if is_dataclass(value):
        return described(value)
    return str(getattr(value, "__name__", type(value).__name__))


def options(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that are not at their defaults."""
    found = {
        f.name: (getattr(value, f.name), f.default) for f in fields(value) if f.repr and f.init
    }
    return {name: given for name, (given, default) in found.items() if not _same(given, default)}


def described(value: Any) -> str:
    """Return a dataclass as the call that makes it, without the options at their defaults.

    Example:
        >>> from torchopt.linear_solve import CG
        >>> described(CG(maxiter=3))
        'CG(maxiter=3)'
    """
    if not is_dataclass(value) or isinstance(value, type):
        return str(value)
    return call(type(value).__name__.lstrip("_"), options(value))


def call(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the text of a call with arguments by name."""
    return f"{name}({', '.join(f'{key}={shown(value)}' for key, value in arguments.items())})"


def _same(given: Any, default: Any) -> bool:
    return given is default or (
        type(given) is type(default) and isinstance(given, ATOMS) and given == default
    )


class Described:
    """The base class of dataclasses whose `repr` is `described`, which `dataclass` keeps."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = described  # type: ignore[method-assign]
