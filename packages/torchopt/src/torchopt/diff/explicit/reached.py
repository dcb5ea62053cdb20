# SPDX-License-Identifier: Apache-2.0
"""The fingerprint of a function that is called often, computed again only after a change."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Set
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn

from torchopt.diff.closure import LIBRARIES, global_names, own_classes, root_of, slot_names
from torchopt.diff.explicit.fingerprint import (
    Fingerprint,
    content_of,
    fingerprint,
    form_of,
    is_constant,
    module_places,
)
from torchopt.torch_internals import listed_weights

__all__ = ["Reached"]

PLAIN = (dict, OrderedDict)
SEARCHED = (np.ndarray, array, Iterator, torch.jit.ScriptModule)
PASSED_BY = (type, types.ModuleType, types.BuiltinFunctionType, types.MethodType)
EXCHANGED = ("_parameters", "_buffers")


class Reached:
    """The current fingerprint of some values, for each call.

    Everything that the last search visited is compared by identity, in loops in C, which takes a
    tenth of the time of a search. If an object has changed, everything is searched again. Several
    threads may call this at the same time: the record is replaced, never changed.

    Args:
        values: Functions, or objects that hold functions.
        exchanged: A module among them whose parameters and buffers `search` exchanges.
    """

    def __init__(self, *values: Any, exchanged: nn.Module | None = None) -> None:
        self._values, self._exchanged = values, exchanged
        self._last: _Seen | None = None

    def search(self) -> Fingerprint:
        """Return the current fingerprint, from a search."""
        return fingerprint(*self._values)

    def now(self) -> Fingerprint:
        """Return the current fingerprint."""
        last = self._last
        if last is not None and last.is_current():
            return last.fingerprint
        self._last = last = None  # so that old values do not stay alive with the new ones
        found = self.search()
        inside = () if self._exchanged is None else self._exchanged.modules()
        read = _reader(found.visited, set(map(id, inside)))
        if read is not None:
            seen = _Seen(found, read, read(), [form_of(x) for x in found.tensors])
            # Another thread may have changed something between the search and `read`.
            if self.search().key == found.key:
                self._last = seen
        return found


@dataclass(frozen=True)
class _Seen:
    """A fingerprint and everything that was read for it."""

    fingerprint: Fingerprint
    read: Callable[[], list[Any]]
    values: list[Any]
    forms: list[Any]

    def is_current(self) -> bool:
        """Return whether reading would give the same now."""
        now, before = self.read(), self.values
        return (
            len(now) == len(before)
            and now[0] == before[0]
            and all(map(operator.is_, now[1:], before[1:]))
            and [form_of(x) for x in self.fingerprint.tensors] == self.forms
        )


def _reader(visited: tuple[Any, ...], exchanged: Set[int]) -> Callable[[], list[Any]] | None:
    """Return a function that reads the contents of these objects; None if a search is needed.

    Args:
        visited: The objects.
        exchanged: The ids of modules of whose parameters and buffers only the names count.
    """
    apart: list[nn.Module] = []
    tables: list[dict[Any, Any]] = []
    lists: list[Any] = []
    classes = {id(base): vars(base) for found in visited for base in own_classes(_class_of(found))}
    references: list[Callable[[], Any]] = []
    # Tables and names, which may be missing in them.
    places = [(vars(module), name) for module, name in module_places(visited)]
    attributes: list[tuple[Any, str]] = []
    for found in visited:
        if isinstance(found, types.FunctionType):
            tables.append(vars(found))
            attributes += ((found, name) for name in ("__code__", "__defaults__", "__kwdefaults__"))
            attributes += ((cell, "cell_contents") for cell in found.__closure__ or ())
            places += _globals(found)
        elif isinstance(found, PASSED_BY):
            continue
        elif isinstance(found, weakref.ref):
            references.append(found)
        elif isinstance(found, ContextVar):
            references.append(functools.partial(found.get, None))
        elif isinstance(found, (list, tuple, set, frozenset, deque)):
            lists.append(found)
            tables += filter(None, [getattr(found, "__dict__", None)])
        elif isinstance(found, Mapping):
            if type(found) not in PLAIN:
                return None
            tables.append(found)  # type: ignore[arg-type]
        elif is_constant(found):
            continue
        elif isinstance(found, SEARCHED) or content_of(found) is not None:
            return None
        elif id(found) in exchanged:
            others = (x for k, x in vars(found).items() if k not in EXCHANGED)
            is_plain = all(type(x) in PLAIN for x in others if isinstance(x, dict))
            if isinstance(found, nn.RNNBase) or slot_names(type(found)) or not is_plain:
                return None
            apart.append(found)
            attributes.append((type(found), "forward"))
        else:
            own = getattr(found, "__dict__", None)
            if own is not None:
                tables.append(own)
            if isinstance(found, nn.Module):
                attributes.append((type(found), "forward"))
                inner = [x for x in own.values() if isinstance(x, dict)]  # type: ignore[union-attr]
                if any(type(x) not in PLAIN for x in inner):
                    return None
                tables += inner
                if isinstance(found, nn.RNNBase):  # a search may have passed it by
                    lists.append(listed_weights(found))
            attributes += ((found, name) for name in slot_names(type(found)))

    tables = list({id(x): x for x in tables}.values())
    tables_of_places, names = [list(x) for x in zip(*places)] or ([], [])
    holders, attributes_of = [list(x) for x in zip(*attributes)] or ([], [])
    nothing = [None] * len(attributes)
    keys = [*tables, *classes.values(), *lists]

    def read() -> list[Any]:
        return [
            # An entry may move from the end of one table to the next.
            [*map(len, keys), *chain.from_iterable(map(_sizes, apart))],
            *chain.from_iterable(map(_contents, apart)),
            *chain.from_iterable(keys),
            *chain.from_iterable(map(dict.values, tables)),
            *chain.from_iterable(x.values() for x in classes.values()),
            *(x() for x in references),
            *map(dict.get, tables_of_places, names),
            *map(getattr, holders, attributes_of, nothing),
            *map(type, visited),
        ]

    return read


def _sizes(module: nn.Module) -> list[int]:
    return [len(x) for x in list(vars(module).values()) if isinstance(x, (dict, list, set))]


def _contents(module: nn.Module) -> Iterator[Any]:
    """Yield the attributes of a module, and the entries of those that a replay copies."""
    for name, x in list(vars(module).items()):
        yield name
        if name in EXCHANGED:
            yield from dict.keys(x)
            yield from (y is None for y in dict.values(x))
        elif isinstance(x, dict):
            yield from x
            yield from x.values()
        elif type(x) in (list, set):
            yield from x
        else:
            yield x


def _globals(function: types.FunctionType) -> list[tuple[Any, str]]:
    """Return the places of the globals of a user's function; see `closure.parts`."""
    table = function.__globals__
    if root_of(str(table.get("__name__"))) in LIBRARIES:
        return []
    return [(table, name) for name in global_names(function.__code__)]


def _class_of(found: Any) -> type:
    return found if isinstance(found, type) else type(found)
