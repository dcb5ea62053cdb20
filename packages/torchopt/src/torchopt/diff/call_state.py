# SPDX-License-Identifier: Apache-2.0
"""What a function reaches without being given it, as it was when a call began.

A derivative belongs to a call: where the function runs again for it, it has to find the buffers,
training flags, counters and random generators that the call found, and has to leave no trace.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.diff.closure import captured
from torchopt.errors import NotDifferentiableError
from torchopt.tree_function import PLAIN

__all__ = ["CallState"]

# Entries that are copied when a call begins, and of a tensor whose copy is kept in any case: of a
# larger one that the call left alone, the version is compared.
COPIED, KEPT = 2**24, 2**16
ENTRIES = 256
CELL = object()


@dataclass
class _Slot:
    """A place that holds a number or a tensor: an entry of a dict or list, or a closure's cell."""

    holder: Any
    key: Any
    value: Any = None

    def read(self) -> Any:
        return self.holder.cell_contents if self.key is CELL else self.holder[self.key]

    def write(self, value: Any) -> None:
        with contextlib.suppress(LookupError, ValueError):
            if self.read() is value:
                return
        if self.key is CELL:
            self.holder.cell_contents = value
        elif isinstance(self.holder, dict) or self.key < len(self.holder):
            self.holder[self.key] = value


@dataclass
class _Large:
    """A tensor of which no copy can be kept, or only one for the time of the call itself.

    It is written behind the version counter: no graph that kept it is void.
    """

    tensor: Tensor
    name: str
    version: int
    copy: Tensor | None

    def put_back(self) -> None:
        if self.tensor._version == self.version:
            return
        if self.copy is None:
            raise NotDifferentiableError(
                f"zero-order estimation: expected {self.name}, of shape "
                f"{tuple(self.tensor.shape)}, to stay as it was when the function was called, but "
                "it was overwritten since, and is too large for a copy. Pass it as an argument, or "
                "do not write into it before the backward pass."
            )
        self.tensor.data.copy_(self.copy)
        self.version = self.tensor._version


class _Small:
    """Tensors of which copies are kept. They are written behind the version counter."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.copies: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.tensors.append(x)
        self.copies.append(x.detach().clone())

    def write(self, copies: list[Tensor]) -> None:
        if copies:
            torch._foreach_copy_([x.data for x in self.tensors], copies)

    def read(self) -> list[Tensor]:
        return [x.detach().clone() for x in self.tensors]


class CallState:
    """The tensors, numbers, training flags and random generators that a function can reach.

    Closures, bound objects, modules, partials, globals, containers and attributes are searched.
    Numbers are put back where they are; what is added to a list or dict, a log, is not taken out.

    Args:
        function: The function.
        given: Tensors that are given to it in other ways, and are left alone.
        more: Tensors that it is given as they are.
    """

    def __init__(
        self, function: Any, given: Iterable[Tensor] = (), more: Iterable[Tensor] = ()
    ) -> None:
        left_alone = {id(x) for x in given}
        self.slots: list[_Slot] = []
        self.small, self.large = _Small(), list[_Large]()
        self.generators: list[tuple[Callable[[Any], Any], Any]] = []
        room = COPIED
        found = itertools.chain(captured(function, object), (("an argument", x) for x in more))
        for name, x in found:
            if isinstance(x, Tensor):
                if id(x) not in left_alone and _has_version(x):
                    left_alone.add(id(x))
                    fits = x.numel() <= room
                    room -= x.numel() if fits else 0
                    if fits and x.numel() <= KEPT:
                        self.small.add(x)
                    else:
                        copy = x.detach().clone() if fits else None
                        self.large.append(_Large(x, name, x._version, copy))
                continue
            self.slots.extend(_slots(x))
            self.generators.extend(_generator(x))

    def settle(self) -> None:
        """Drop copies of large tensors that the call left alone."""
        for large in self.large:
            if large.tensor._version == large.version:
                large.copy = None

    def reset(self) -> None:
        """Put everything as it was when the call began.

        Raises:
            NotDifferentiableError: A tensor that is too large for a copy was overwritten.
        """
        for slot in self.slots:
            slot.write(slot.value)
        self.small.write(self.small.copies)
        for large in self.large:
            large.put_back()
        for put, state in self.generators:
            put(state)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """On exit, also by an exception, put back what is there now."""
        now = [_Slot(s.holder, s.key, _read(s)) for s in self.slots]
        small = self.small.read()
        kept = [
            (x, x.tensor.detach().clone())
            for x in self.large
            if x.copy is not None and x.tensor._version != x.version
        ]
        states = [(put, _state_of(put)) for put, _ in self.generators]
        try:
            yield
        finally:
            for slot in now:
                if slot.value is not CELL:
                    slot.write(slot.value)
            self.small.write(small)
            for large in self.large:
                if large.copy is not None:
                    large.put_back()
            for large, copy in kept:
                large.tensor.data.copy_(copy)
                large.version = -1
            for put, state in states:
                put(state)


def _read(slot: _Slot) -> Any:
    try:
        return slot.read()
    except (LookupError, ValueError):
        return CELL


def _has_version(x: Tensor) -> bool:
    return (
        isinstance(x, PLAIN)
        and x.layout is torch.strided
        and not x.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _holds(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)


def _slots(found: Any) -> Iterator[_Slot]:
    if isinstance(found, types.FunctionType):
        for cell in found.__closure__ or ():
            slot = _Slot(cell, CELL)
            slot.value = _read(slot)
            if _holds(slot.value):
                yield slot
        names = set(found.__code__.co_names)
        yield from _entries(found.__globals__, names & found.__globals__.keys())
    elif isinstance(found, dict):
        yield from _entries(found, itertools.islice(list(found), ENTRIES))
    elif isinstance(found, list):
        yield from _entries(found, range(min(len(found), ENTRIES)))
    elif not isinstance(found, (type, types.ModuleType)):
        attributes = getattr(found, "__dict__", None)
        if isinstance(attributes, dict):
            yield from _entries(attributes, list(attributes))
        if isinstance(found, nn.Module):
            yield _Slot(vars(found), "training", found.training)
            yield from _entries(found._buffers, list(found._buffers))


def _entries(holder: Any, keys: Iterable[Any]) -> Iterator[_Slot]:
    return (_Slot(holder, key, holder[key]) for key in keys if _holds(holder[key]))


def _generator(found: Any) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    if isinstance(found, torch.Generator):
        yield found.set_state, found.get_state()
    elif isinstance(found, random.Random):
        yield found.setstate, found.getstate()
    elif (numpy := sys.modules.get("numpy")) is not None:
        if isinstance(found, numpy.random.Generator):
            yield _BitGenerator(found.bit_generator), found.bit_generator.state
        elif isinstance(found, numpy.random.RandomState):
            yield found.set_state, found.get_state()


@dataclass
class _BitGenerator:
    """Sets the state of a generator of numpy."""

    generator: Any

    def __call__(self, state: Any) -> None:
        self.generator.state = state


def _state_of(put: Any) -> Any:
    if isinstance(put, _BitGenerator):
        return put.generator.state
    owner = put.__self__
    return owner.getstate() if isinstance(owner, random.Random) else owner.get_state()
