# SPDX-License-Identifier: Apache-2.0
"""State that a function reaches besides its arguments: slots, containers, arrays, generators."""

from __future__ import annotations

import contextlib
import io
import itertools
import operator
import random
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.diff.closure import LIBRARIES, captured, code_names, root_of, slot_names
from torchopt.diff.recorder import Recorder
from torchopt.torch_internals import bump_versions, is_transforming, is_wrapped

__all__ = [
    "MISSING",
    "Content",
    "Elements",
    "Slot",
    "Source",
    "contents",
    "counted",
    "has_no_graph",
    "is_copied",
    "is_number",
    "numpy_source",
    "recorded_iterators",
    "slots",
    "sources",
    "table_of",
    "what_varies",
]

# Largest number of entries of a container that is searched, and of one that is copied.
ENTRIES, COPIED = 256, 2**14
# Only these: a container class of the user may do anything when it is cleared and filled.
COPYABLE = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
CELL, MISSING = object(), object()


@dataclass
class Slot:
    """A cell of a closure, or an entry of a dict or list."""

    holder: Any
    key: Any
    value: Any = MISSING

    def read(self) -> Any:
        """Return the current content, or `MISSING`."""
        if isinstance(self.holder, dict):  # `[]` of a defaultdict would make an entry
            return dict.get(self.holder, self.key, MISSING)
        try:
            return self.holder.cell_contents if self.key is CELL else self.holder[self.key]
        except (LookupError, ValueError):
            return MISSING

    def write(self, value: Any) -> None:
        """Set the content; `MISSING` removes the entry of a dict."""
        if self.read() is value:
            return
        if self.key is CELL:
            if value is MISSING:
                del self.holder.cell_contents
            else:
                self.holder.cell_contents = value
        elif isinstance(self.holder, dict):
            if value is MISSING:
                del self.holder[self.key]
            else:
                self.holder[self.key] = value
        elif value is not MISSING and self.key < len(self.holder):
            self.holder[self.key] = value


@dataclass
class Attribute(Slot):
    """An attribute of a class, or of an object with `__slots__`."""

    def read(self) -> Any:
        """Return the current content, or `MISSING`."""
        if isinstance(self.holder, type):
            return vars(self.holder).get(self.key, MISSING)
        return getattr(self.holder, self.key, MISSING)

    def write(self, value: Any) -> None:
        """Set the content; `MISSING` removes the attribute."""
        if self.read() is value:
            return
        owner: Any = type if isinstance(self.holder, type) else object  # works for frozen ones
        if value is MISSING:
            owner.__delattr__(self.holder, self.key)
        else:
            owner.__setattr__(self.holder, self.key, value)


@dataclass(frozen=True)
class Source:
    """A source of random numbers with a recorded state."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]
    state: Any

    @staticmethod
    def of(get: Callable[[], Any], put: Callable[[Any], Any]) -> Source:
        """Return a source with its current state."""
        return Source(get, put, get())

    def is_at(self, state: Any) -> bool:
        """Return whether a state equals the recorded one."""
        if isinstance(state, Tensor):
            return torch.equal(state, self.state)
        return bool(state == self.state)


@contextlib.contextmanager
def recorded_iterators(function: Any) -> Iterator[None]:
    """Return a context in which the iterators that a function reaches can be rewound."""
    recorders: dict[int, Recorder] = {}
    places = []
    for _, found in captured(function, object):
        for slot in slots(found, _is_iterator):
            recorder = recorders.setdefault(id(slot.value), Recorder(slot.value))
            places.append((slot, recorder))
    for slot, recorder in places:
        slot.write(recorder)
    try:
        yield
    finally:
        for slot, recorder in places:
            if slot.read() is recorder:
                slot.write(recorder.iterator)


def _is_iterator(value: Any) -> bool:
    # An iterator that the user wrote as a class is restored through its attributes instead.
    written = isinstance(getattr(type(value), "__next__", None), types.FunctionType)
    others = isinstance(value, (io.IOBase, Recorder)) or (written and _is_of_user(value))
    return isinstance(value, Iterator) and not others


def sources(found: Any) -> Iterator[Source]:
    """Yield a source for an object that is a random number generator of the user."""
    if found is torch.default_generator or found is random.getstate.__self__:  # type: ignore[attr-defined]
        return
    if isinstance(found, Recorder):
        yield Source.of(lambda: found.place, found.seek)
    elif isinstance(found, torch.Generator):
        yield Source.of(found.get_state, found.set_state)
    elif isinstance(found, random.Random):
        yield Source.of(found.getstate, found.setstate)
    elif (numpy := sys.modules.get("numpy")) is not None:
        if isinstance(found, numpy.random.Generator):
            bits = found.bit_generator
            yield Source.of(lambda: bits.state, lambda state: setattr(bits, "state", state))
        elif isinstance(found, numpy.random.RandomState) and found is not _shared(numpy):
            yield numpy_source(found)


def _shared(numpy: Any) -> Any:
    return getattr(numpy.random.get_state, "__self__", None)


def numpy_source(owner: Any) -> Source:
    """Return a source for a legacy generator of numpy, or for `numpy.random` itself."""

    def get() -> tuple[Any, ...]:
        name, keys, *rest = owner.get_state()
        return (name, keys.tobytes(), *rest)

    def put(state: tuple[Any, ...]) -> None:
        name, keys, *rest = state
        owner.set_state((name, sys.modules["numpy"].frombuffer(keys, dtype="uint32"), *rest))

    return Source.of(get, put)


def slots(found: Any, holds: Callable[[Any], bool]) -> Iterator[Slot]:
    """Yield the slots of an object whose values satisfy `holds`, with the current values."""
    for slot in _slots(found):
        slot.value = slot.read()
        if slot.value is not MISSING and holds(slot.value):
            yield slot


def _slots(found: Any) -> Iterator[Slot]:
    if isinstance(found, types.FunctionType):
        yield from (Slot(cell, CELL) for cell in found.__closure__ or ())
        names = code_names(found.__code__)
        if root_of(found.__globals__.get("__name__")) not in LIBRARIES:
            yield from _entries(found.__globals__, names)
            for name in names:
                module = found.__globals__.get(name)
                if isinstance(module, types.ModuleType) and root_of(module) not in LIBRARIES:
                    yield from _entries(vars(module), names)
    elif isinstance(found, dict):
        yield from _entries(found, itertools.islice(list(found), ENTRIES))
    elif isinstance(found, list):
        yield from _entries(found, range(min(len(found), ENTRIES)))
    elif isinstance(found, type):
        if root_of(found) not in LIBRARIES:
            keys = [k for k in vars(found) if not k.startswith("__")]
            yield from (Attribute(found, key) for key in keys)
    elif not isinstance(found, (types.ModuleType, nn.Module)) and _is_of_user(found):
        attributes = getattr(found, "__dict__", None)
        if isinstance(attributes, dict):
            yield from _entries(attributes, list(attributes))
        if root_of(type(found)) not in LIBRARIES:
            yield from (Attribute(found, key) for key in slot_names(type(found)))


def table_of(found: Any) -> dict[str, Any] | None:
    """Return the attribute dict of an object or function of the user, or None."""
    if isinstance(found, types.FunctionType):
        own = root_of(found.__globals__.get("__name__")) not in LIBRARIES
        return found.__dict__ if own else None
    if isinstance(found, (type, types.ModuleType, nn.Module)) or not _is_of_user(found):
        return None
    table = getattr(found, "__dict__", None)
    return table if type(table) is dict else None


def _is_of_user(found: Any) -> bool:
    own = root_of(type(found)) not in ("torch", "torchopt", "optree", "numpy", "builtins")
    return own or hasattr(type(found), "changes_in_use")


def what_varies(optimizer: Any) -> list[tuple[str, Any]]:
    """Return (name, object) for the parts of an optimizer that may change between two steps.

    These are schedules of the user, modules, and tensors that are not differentiated.
    """

    def varies(found: Any) -> bool:
        if isinstance(found, Tensor):
            return not (found.requires_grad or is_wrapped(found))
        if isinstance(found, types.FunctionType):
            return root_of(found) not in LIBRARIES
        in_slots = _is_of_user(found) and slot_names(type(found))
        return isinstance(found, nn.Module) or table_of(found) is not None or bool(in_slots)

    return [(name, x) for name, x in captured(optimizer, object) if varies(x)]


def _entries(holder: Any, keys: Iterable[Any]) -> Iterator[Slot]:
    return (Slot(holder, key) for key in keys)


def is_number(value: Any) -> bool:
    """Return whether a value is a number or a tensor."""
    return isinstance(value, (int, float, complex, Tensor)) and not isinstance(value, bool)


def has_no_graph(value: Any) -> bool:
    """Return whether a value is not a tensor with a graph, which keeping it would keep alive."""
    return not isinstance(value, Tensor) or value.grad_fn is None


@dataclass
class Content:
    """The recorded content of a container or an array."""

    holder: Any
    copy: Any

    def put(self, *, counting: bool = False, silent: bool = False) -> Callable[[], None]:
        """Restore the recorded content; return a function that undoes this.

        Entries that are added to a list or dict in the meantime are a log, and the undo keeps them.

        Args:
            counting: Whether the undo also keeps the increase of an int.
            silent: Whether the undo keeps nothing.
        """
        holder, copy = self.holder, self.copy
        before = holder.copy()
        self._fill(copy)

        def back() -> None:
            if counting and isinstance(holder, (list, dict)):
                keys = range(min(map(len, (holder, copy, before))))
                for key in before if isinstance(before, dict) else keys:
                    if isinstance(before, list) or (key in holder and key in copy):
                        before[key] = counted(before[key], copy[key], holder[key])
            if silent:
                pass
            elif isinstance(holder, (list, deque)):
                before.extend(itertools.islice(holder, len(copy), None))
            elif isinstance(holder, dict):
                before.update(
                    {k: v for k, v in holder.items() if k not in copy and k not in before}
                )
            elif isinstance(holder, set):
                before.update(holder - copy)
            self._fill(before)

        return back

    def _fill(self, content: Any) -> None:
        holder = self.holder
        if isinstance(holder, (list, deque)):
            if len(holder) != len(content) or not all(map(operator.is_, holder, content)):
                holder.clear()
                holder.extend(content)
        elif isinstance(holder, (dict, set)):
            if isinstance(holder, set) or not _same(holder, content):
                holder.clear()
                holder.update(content)
        elif holder.flags.writeable:
            holder[...] = content


@dataclass
class Elements:
    """The recorded elements of a tensor that may be changed in place."""

    holder: Tensor
    copy: Tensor
    version: int
    put_at: int | None = None  # the version that they replace, while they are in place

    @staticmethod
    def of(x: Tensor, before: Elements | None = None) -> Elements:
        """Record the current elements; return `before` if nothing was written since."""
        if before is not None and x._version in (before.version, before.put_at):
            return before
        return Elements(x, x.detach().clone(), x._version)

    @property
    def is_written(self) -> bool:
        """Whether the tensor was written to since."""
        return self.holder._version != self.version

    def put(self, *, always: bool) -> Callable[[], None]:
        """Restore the recorded elements; return a function that undoes this.

        They get memory of their own, which tensors saved for a backward pass keep alive. Inside of
        a transform nothing is done, because that memory would belong to the transform.

        Args:
            always: Restore even if nothing was written yet, because something may be written
                in the meantime.
        """
        if is_transforming():
            return lambda: None
        holder, version = self.holder, self.holder._version
        before, put_at = holder.data, self.put_at
        if always or self.is_written:
            holder.data = self.copy.clone()
            self.put_at = version

        def back() -> None:
            holder.data, self.put_at = before, put_at
            if holder._version != version:  # the restored elements were written to, not these
                bump_versions([holder])

        return back


def is_copied(x: Tensor) -> bool:
    """Return whether the elements of a tensor are copied, which only small tensors are."""
    plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided
    if not plain or x.numel() > COPIED or x.is_inference():
        return False
    return x.grad_fn is None and not is_wrapped(x)


def counted(before: Any, put: Any, after: Any) -> Any:
    """Return `before`; for an int, plus the increase from `put` to `after`."""
    if type(before) is int and type(put) is int and type(after) is int:
        return before + after - put
    return before


def _same(first: dict[Any, Any], second: dict[Any, Any]) -> bool:
    return len(first) == len(second) and all(
        a is b and x is y for (a, x), (b, y) in zip(first.items(), second.items())
    )


def contents(found: Any) -> Iterator[Content]:
    """Yield the content of an object if it is a container or array that can be copied."""
    numpy: Any = sys.modules.get("numpy")
    if type(found) in COPYABLE:
        values = found.values() if isinstance(found, dict) else found
        if len(found) <= COPIED and all(map(has_no_graph, values)):
            yield Content(found, found.copy())
    elif numpy is not None and isinstance(found, numpy.ndarray) and found.size <= COPIED:
        yield Content(found, found.copy())
