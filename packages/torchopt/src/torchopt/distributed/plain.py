# SPDX-License-Identifier: Apache-2.0
"""States as bytes that can be read without running code.

torch reads tensors and plain containers (`weights_only=True`). The states of torchopt's optimizers
are named tuples, whose classes are declared safe for the time of reading.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["decode", "encode", "with_manifest"]


def encode(step: int, state: Any) -> bytes:
    """Return a step and a state as bytes.

    Raises:
        TypeError: The state contains something that `decode` would refuse.
    """
    data = _saved({"step": step, "state": state})
    refused = [name for name in _unknown(data) if _class_of(name) is None]
    if refused:
        where = _place(state, refused[0], "$") or "$"
        raise TypeError(
            "Checkpoint.save: expected tensors, numbers, strings, containers of them and states of "
            f"torchopt's optimizers, got {refused[0]} at {where}; save what it holds, or tell "
            "torch that it is safe (torch.serialization.add_safe_globals)"
        )
    return data


def with_manifest(data: bytes, manifest: Any) -> bytes:
    """Return the bytes of a state with the manifest of its shards added."""
    return _saved({**_loaded(data), "shards": manifest})


def decode(data: bytes) -> tuple[int, Any, Any]:
    """Return the step, the state and the manifest of its shards, which may be None."""
    found = _loaded(data)
    return int(found["step"]), found["state"], found.get("shards")


def _saved(tree: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file)
    return file.getvalue()


def _loaded(data: bytes) -> Any:
    classes = [found for name in _unknown(data) if (found := _class_of(name)) is not None]
    with torch.serialization.safe_globals(classes):
        return torch.load(io.BytesIO(data), weights_only=True)


def _unknown(data: bytes) -> list[str]:
    return torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))


def _class_of(name: str) -> Any:
    """Return torchopt's named tuple of this name, or None."""
    module, _, key = name.rpartition(".")
    if not module.startswith("torchopt."):
        return None
    try:
        found = getattr(importlib.import_module(module), key, None)
    except ImportError:
        return None
    return found if isinstance(found, type) and issubclass(found, tuple) else None


def _place(tree: Any, name: str, path: str) -> str | None:
    """Return the path of the first value of a class, or None."""
    kind = type(tree)
    if f"{kind.__module__}.{kind.__qualname__}" == name or (
        callable(tree)
        and f"{getattr(tree, '__module__', '')}.{getattr(tree, '__name__', '')}" == name
    ):
        return path
    items: Any = ()
    if isinstance(tree, Mapping):
        items = ((f"[{key!r}]", x) for key, x in tree.items())
    elif isinstance(tree, (list, tuple)):
        items = ((f"[{k}]", x) for k, x in enumerate(tree))
    for key, x in items:
        found = _place(x, name, path + key)
        if found is not None:
            return found
    return None
