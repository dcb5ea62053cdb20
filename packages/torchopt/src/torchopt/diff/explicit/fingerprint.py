# SPDX-License-Identifier: Apache-2.0
"""Everything that the trace of a function depends on besides its arguments.

A traced program contains every Python value that the function met as a constant. The fingerprint of
a function consists of all values that the function can reach, and of the form of each tensor that
it can reach. If two fingerprints are equal, one program serves both. The tensors themselves are
inputs of the program.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import types
import weakref
from array import array
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchopt import torch_internals
from torchopt.diff.closure import (
    ATOMS,
    ENTRIES,
    LIBRARIES,
    code_names,
    global_names,
    own_classes,
    parts,
    root_of,
    slot_names,
)
from torchopt.errors import NotTraceableError
from torchopt.precision import with_autocast, with_default_device

__all__ = [
    "Fingerprint",
    "Settings",
    "content_of",
    "fingerprint",
    "form_of",
    "is_constant",
    "join",
    "module_places",
    "settings",
]

NUMBERS = (float, complex)
# Modules whose objects are values, compared by ==; their slots may be caches.
VALUES = {"datetime", "decimal", "fractions", "ipaddress", "pathlib", "uuid"}
READERS = ("eval", "exec", "globals")
MOST = 20_000  # objects that a function may reach


@dataclass(frozen=True)
class _Same:
    """An object compared by identity; it is kept alive, so that its id is not reused."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


class Key:
    """A long key that is looked up often; its hash is computed once."""

    def __init__(self, parts: tuple[Hashable, ...]) -> None:
        self.parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Key) and self._hash == other._hash and self.parts == other.parts
        )


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Everything that a function can reach.

    Attributes:
        key: Values, code and forms of tensors, in the order in which they were found.
        tensors: The tensors themselves.
        names: The names of the tensors.
        visited: All objects that were searched.
    """

    key: Key
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    visited: tuple[Any, ...] = field(repr=False)

    def difference(self, other: Fingerprint) -> str | None:
        """Return the name of the first value that differs; None if all are the same."""
        return _difference(self.key, other.key)

    def require_same(
        self, now: Fingerprint, where: str, way_out: str, *, tensors: bool = False
    ) -> None:
        """Raise if values have changed since the run, so that its program would differ now.

        Args:
            now: The current fingerprint.
            where: The beginning of the message.
            way_out: Its end.
            tensors: Whether the tensors must be the same objects, too.
        """
        name = self.difference(now)
        if name is None and tensors:
            found = zip(self.names, self.tensors, now.tensors)
            name = next((n for n, x, y in found if x is not y), None)
        if name is not None:
            raise RuntimeError(
                f"{where}: expected functions that read the same values in the backward pass as in "
                f"the run, got {name}, which has another value now; change it after the backward "
                f"pass, or {way_out}."
            )


def _difference(first: Key, second: Key) -> str | None:
    if first == second:
        return None
    for x, y in zip(first.parts, second.parts):
        if x == y:
            continue
        if isinstance(x, Key) and isinstance(y, Key):
            return _difference(x, y)
        return str(x[0]) if isinstance(x, tuple) and x and x[0] else "a value"
    return "what it holds"


def form_of(x: Tensor) -> tuple[Hashable, ...]:
    """Return the properties of a tensor that a trace depends on."""
    place = x.stride() if x.layout is torch.strided else x.layout
    return x.shape, x.dtype, x.device, x.requires_grad, place


def settings() -> tuple[Hashable, ...]:
    """Return the settings of torch that decide which operations run."""
    autocast: tuple[Hashable, ...] = ()
    if torch_internals.any_autocast():
        autocast = tuple(
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        )
    return (
        torch.get_default_dtype(),
        torch_internals.default_device(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        autocast,
        torch.is_inference_mode_enabled(),
        *map(_Same, torch_internals.hooks_of_all_modules()),
    )


class Settings:
    """The settings of torch at one moment, for what runs again later."""

    def __init__(self) -> None:
        self._found, self._autocast = settings(), torch_internals.autocast_now()
        self._device = torch_internals.default_device()

    @contextlib.contextmanager
    def restored(self, where: str, way_out: str) -> Iterator[None]:
        """Return a context with the autocast and the default device of that moment.

        Raises:
            RuntimeError: Another setting has changed since.
        """
        with with_autocast(self._autocast), with_default_device(self._device):
            if settings() != self._found:
                raise RuntimeError(
                    f"{where}: expected the same settings of torch, such as the default dtype, in "
                    "the backward pass as in the run, got different ones; change them after the "
                    f"backward pass, or {way_out}."
                )
            yield


def fingerprint(*values: Any) -> Fingerprint:
    """Return the fingerprint of functions, or of objects that hold functions.

    The tensors of each come after those of the one before, as in a `join` of their fingerprints:
    a program finds its tensors by their positions.

    Raises:
        NotTraceableError: They reach more objects than can be compared at each call.
    """
    return _searched(*values) if len(values) == 1 else join(*map(_searched, values))


def _searched(value: Any) -> Fingerprint:
    seen: dict[int, int] = {}
    key: list[Hashable] = []
    tensors: list[Tensor] = []
    names: list[str] = []
    visited: list[Any] = []
    queue: deque[tuple[str, Any]] = deque([("", value)])
    known: set[tuple[int, str]] = set()
    while queue or _in_modules(visited, known, queue):
        name, found = queue.popleft()
        if isinstance(found, ATOMS):
            # 0.0 and -0.0 are equal, and so are 1 and True; nan is not.
            key.append((name, type(found), repr(found) if isinstance(found, NUMBERS) else found))
            if type(found) in ATOMS or not getattr(found, "__dict__", None):
                continue
        if id(found) in seen:
            key.append((name, "again", seen[id(found)]))
            continue
        seen[id(found)] = len(seen)
        if len(seen) > MOST:
            raise NotTraceableError(
                f"a traced program: expected a function that reaches at most {MOST} objects, to be "
                "compared at each call, got more; run it untraced."
            )
        if isinstance(found, Tensor):
            tensors.append(found)
            names.append(name or "a tensor")
            key.append((name, *form_of(found)))
            continue
        key.append((name, *_identity(found)))
        visited.append(found)
        if not hasattr(type(found), "not_searched") and not is_constant(found):
            queue.extend(parts(name, found))
            queue.extend(_more(name, found))
    return Fingerprint(Key(tuple(key)), tuple(tensors), tuple(names), tuple(visited))


def join(*found: Fingerprint) -> Fingerprint:
    """Return the fingerprint of several functions; a tensor that two reach appears twice."""
    known: dict[int, int] = {}
    tensors = tuple(x for one in found for x in one.tensors)
    same = tuple(known.setdefault(id(x), i) for i, x in enumerate(tensors))
    return Fingerprint(
        Key((*(one.key for one in found), same)),
        tensors,
        tuple(name for one in found for name in one.names),
        tuple(x for one in found for x in one.visited),
    )


def module_places(visited: Iterable[Any]) -> Iterator[tuple[types.ModuleType, str]]:
    """Yield each module of the user among the objects, with each name used by their functions.

    A function may read `module.name` from a module that it was given or that it holds.
    """
    modules = [
        x for x in visited if isinstance(x, types.ModuleType) and root_of(x) not in LIBRARIES
    ]
    if modules:
        functions = (x for x in visited if isinstance(x, types.FunctionType))
        names = dict.fromkeys(name for f in functions for name in code_names(f.__code__))
        yield from ((module, name) for module in modules for name in names)


def _in_modules(visited: list[Any], known: set[tuple[int, str]], queue: deque[Any]) -> bool:
    """Queue new objects that functions may read from modules; return whether there are any."""
    for module, name in module_places(visited):
        if (id(module), name) not in known and name in vars(module):
            known.add((id(module), name))
            queue.append((f"{module.__name__}.{name}", vars(module)[name]))
    return bool(queue)


def _more(name: str, found: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object reaches through its class or a reference, besides its parts."""
    if isinstance(found, weakref.ref):
        yield name, found()
    elif isinstance(found, ContextVar):
        yield name, found.get(None)
    if isinstance(found, (type, types.ModuleType, types.FunctionType)):
        return
    prefix = f"{name}." if name else ""
    if isinstance(found, (tuple, list, dict, set, frozenset, deque)):
        yield from ((prefix + k, x) for k, x in list(getattr(found, "__dict__", {}).items()))
    for base in own_classes(type(found)):
        for key, x in list(vars(base).items()):
            if not (key.startswith("__") or key == "_abc_impl" or hasattr(type(x), "__get__")):
                yield prefix + key, x


def _identity(found: Any) -> tuple[Any, ...]:
    """Return the properties of an object that are compared besides its parts."""
    if isinstance(found, types.FunctionType):
        _require_visible(found)
        return (found.__code__,)
    if isinstance(found, (type, types.ModuleType, types.BuiltinFunctionType)):
        return (_Same(found),)
    if isinstance(found, np.ndarray):
        return found.shape, str(found.dtype), found.tobytes()
    if isinstance(found, (array, bytearray)):
        return type(found), bytes(found)
    if isinstance(found, Iterator):
        return _Same(found), operator.length_hint(found, -1), *_count_of(found)
    if isinstance(found, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return (found,)
    if isinstance(found, (tuple, list, dict, set, frozenset)):
        if len(found) > ENTRIES:
            raise NotTraceableError(
                f"a traced program: expected containers of at most {ENTRIES} entries in what the "
                f"function holds, to be compared at each call, got a {type(found).__name__} of "
                f"{len(found)}; make it a tensor, or run the function untraced."
            )
        return type(found), len(found)
    if is_constant(found):
        return type(found), found
    if (content := content_of(found)) is not None:
        return type(found), content
    if hasattr(found, "__dict__") or slot_names(type(found)):
        return (type(found),)
    return (_Same(found),)


def is_constant(found: Any) -> bool:
    """Return whether an object is a value of the standard library, such as a Fraction or a path."""
    return root_of(type(found)) in VALUES and not callable(found)


def content_of(found: Any) -> bytes | None:
    """Return the bytes of an object with the buffer protocol; None for any other object."""
    try:
        return memoryview(found).tobytes()
    except TypeError:
        return None


def _require_visible(function: types.FunctionType) -> None:
    if root_of(function) in LIBRARIES:
        return
    names = (x for x in global_names(function.__code__) if x not in function.__globals__)
    called = next((x for x in names if x in READERS), None)
    if called is not None:
        raise NotTraceableError(
            f"a traced program: expected a function whose names say what it reads, got a call of "
            f"{called}() in {function.__qualname__}, which may read anything; run it untraced."
        )


def _count_of(found: Any) -> tuple[str, ...]:
    return (repr(found),) if isinstance(found, itertools.count) else ()
