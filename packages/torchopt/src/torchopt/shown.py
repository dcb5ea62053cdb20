# SPDX-License-Identifier: Apache-2.0
"""Show a value in one short line, without the elements of tensors, for messages and `repr`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from numbers import Number
from typing import Any

import torch
from torch import Tensor

__all__ = ["Described", "call", "described", "options", "shown"]

ATOMS = (Number, str, type(None), torch.dtype, torch.device)


#: The greatest number of characters of an atom, of characters of all items, and of items.
ATOM, ITEMS, COUNT = 80, 400, 8
DEPTH = 6


def shown(value: Any, depth: int = DEPTH) -> str:
    """Return a value as it is written in a call, shortened if it is large. It never raises.

    Args:
        value: Anything.
        depth: How many levels of containers are opened.

    Example:
        >>> import torch
        >>> shown({"M": torch.ones(3, 2), "loss": max, "betas": (0.9, True)})
        "{'M': tensor of shape (3, 2), 'loss': max, 'betas': (0.9, True)}"
        >>> shown([0.5] * 1000)
        '[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, ... 992 more]'
    """
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, ATOMS):
        return _atom(value)
    if isinstance(value, type):
        return _name(value)
    if type(value) in (dict, list, tuple) or is_dataclass(value):
        return _opened(value, depth - 1) if depth else "..."
    if isinstance(value, tuple) and hasattr(value, "init"):
        return repr(value)  # a gradient transformation
    return _name(value)


def _opened(value: Any, depth: int) -> str:
    """Return the text of a container with its items."""
    if type(value) is dict:
        pairs = (f"{shown(key, depth)}: {shown(x, depth)}" for key, x in value.items())
        return "{" + _listed(pairs, len(value)) + "}"
    if type(value) not in (list, tuple):
        return described(value, depth)
    inside = _listed((shown(x, depth) for x in value), len(value))
    return f"({inside})" if type(value) is tuple else f"[{inside}]"


def _listed(texts: Iterable[str], count: int) -> str:
    """Return the first texts, and how many more there are."""
    found: list[str] = []
    length = 0
    for text in texts:
        length += len(text)
        if found and (len(found) == COUNT or length > ITEMS):
            return ", ".join((*found, f"... {count - len(found)} more"))
        found.append(text)
    return ", ".join(found)


def _atom(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        return type(value).__name__
    return text if len(text) <= ATOM else f"{text[: ATOM - 3]}..."


def _name(value: Any) -> str:
    try:
        return str(value.__name__)
    except Exception:
        return type(value).__name__


def options(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults or are always shown."""
    found = ((f, getattr(value, f.name)) for f in fields(value) if f.repr and f.init)
    return {
        f.name: given
        for f, given in found
        if f.metadata.get("shown") or not _same(given, f.default)
    }


def described(value: Any, depth: int = DEPTH) -> str:
    """Return a dataclass as the call that makes it, without options that have their defaults.

    Example:
        >>> from torchopt.linear_solve import CG
        >>> described(CG(maxiter=3))
        'CG(maxiter=3)'
    """
    if not is_dataclass(value) or isinstance(value, type):
        return str(value)
    return call(type(value).__name__.lstrip("_"), options(value), depth)


def call(name: str, arguments: Mapping[str, Any], depth: int = DEPTH) -> str:
    """Return the text of a call with arguments by name."""
    return (
        f"{name}({', '.join(f'{key}={shown(value, depth)}' for key, value in arguments.items())})"
    )


def _same(given: Any, default: Any) -> bool:
    return given is default or (
        type(given) is type(default) and isinstance(given, ATOMS) and given == default
    )


class Described:
    """The base class of dataclasses whose `repr` is `described`.

    A class that defines or inherits another `repr` keeps it.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):
            inherited: Any = super(cls, cls).__repr__
            own = described if inherited is object.__repr__ else inherited
            cls.__repr__ = own  # type: ignore[method-assign]
