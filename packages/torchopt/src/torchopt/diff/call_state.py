# SPDX-License-Identifier: Apache-2.0
"""The state that a function can reach besides its arguments, as it was when a call began.

A derivative belongs to one call. If the function runs again for the derivative, it must find the
buffers, training flags, counters and random generators as the call found them, and it must leave no
trace.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchopt.diff.closure import captured
from torchopt.diff.places import Slot, Source, is_number, slots, sources
from torchopt.errors import NotDifferentiableError
from torchopt.precision import Modes
from torchopt.torch_internals import foreach_copy_, is_wrapped
from torchopt.tree_function import PLAIN

__all__ = ["CallState"]

# COPIED: how many entries a call copies at most. KEPT: up to how many entries the copy of a tensor
# is always kept. The copy of a larger tensor is dropped if the call does not change the tensor.
COPIED, KEPT = 2**24, 2**16


@dataclass
class _Large:
    """A tensor whose copy is not kept, or is kept only if the call changes the tensor.

    It is restored through `.data`, without incrementing the version counter, so that a graph that
    saved it stays valid.
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
                "it has been overwritten since and is too large to copy. Pass it as an argument, "
                "or do not write into it before the backward pass."
            )
        self.tensor.data.copy_(self.copy)
        self.version = self.tensor._version


class _Small:
    """Tensors whose copies are kept; they too are restored through `.data`."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.copies: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.tensors.append(x)
        self.copies.append(x.detach().clone())

    def write(self, copies: list[Tensor]) -> None:
        if copies:
            foreach_copy_([x.data for x in self.tensors], copies)

    def read(self) -> list[Tensor]:
        return [x.detach().clone() for x in self.tensors]


class CallState:
    """The tensors, numbers, training flags and random generators that a function can reach.

    Closures, bound objects, modules, partials, globals, containers and attributes are searched.
    Numbers are restored; entries that were added to a list or a dict, such as a log, stay.

    Args:
        function: The function.
        given: Tensors that the function is given in other ways; they are left alone.
        more: Tensors that are passed to the function unchanged.
        reached: What `captured(function, object)` yields, if the caller has searched already.
    """

    def __init__(
        self,
        function: Any,
        given: Iterable[Tensor] = (),
        more: Iterable[Tensor] = (),
        reached: Iterable[tuple[str, Any]] | None = None,
    ) -> None:
        left_alone = {id(x) for x in given}
        self.slots: list[Slot] = []
        self.small, self.large = _Small(), list[_Large]()
        self.sources: list[Source] = []
        self._modes = Modes.now()
        room = COPIED
        reached = captured(function, object) if reached is None else reached
        found = itertools.chain(reached, (("an argument", x) for x in more))
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
            self.slots.extend(slots(x, is_number))
            if isinstance(x, nn.Module):
                self.slots += slots(vars(x), _is_of_a_module)
                self.slots += slots(x._buffers, is_number)
            self.sources.extend(sources(x))

    def settle(self) -> None:
        """Drop the copies of large tensors that the call did not change."""
        for large in self.large:
            if large.tensor._version == large.version:
                large.copy = None

    def reset(self) -> None:
        """Restore everything to what it was when the call began.

        Raises:
            NotDifferentiableError: A tensor that is too large to be copied was overwritten.
        """
        for slot in self.slots:
            slot.write(slot.value)
        self.small.write(self.small.copies)
        for large in self.large:
            large.put_back()
        for source in self.sources:
            source.set(source.state)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Restore the current state on exit, also after an exception.

        Inside, torch has the modes that it had when the call began.
        """
        now = [(slot, slot.read()) for slot in self.slots]
        small = self.small.read()
        kept = [
            (x, x.tensor.detach().clone())
            for x in self.large
            if x.copy is not None and x.tensor._version != x.version
        ]
        states = [(source, source.get()) for source in self.sources]
        try:
            with self._modes.entered():
                yield
        finally:
            for slot, value in now:
                slot.write(value)
            self.small.write(small)
            for large in self.large:
                if large.copy is not None:
                    large.put_back()
            for large, copy in kept:
                large.tensor.data.copy_(copy)
                large.version = -1
            for source, state in states:
                source.set(state)


def _is_of_a_module(value: Any) -> bool:
    return isinstance(value, bool) or is_number(value)


def _has_version(x: Tensor) -> bool:
    return (
        isinstance(x, PLAIN)
        and x.layout is torch.strided
        and not x.is_inference()
        and not is_wrapped(x)
    )
