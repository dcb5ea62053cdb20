# SPDX-License-Identifier: Apache-2.0
"""Iterators that give again what they gave, for a loss that is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["Recorder"]


class Recorder:
    """An iterator that can be put back: what it has given is kept, and given again."""

    not_searched = True  # what it has given is no state of the function

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self._given, self.place = iterator, [], 0  # type: ignore[var-annotated]

    def __iter__(self) -> Recorder:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        """Return what the iterator gives next, or what it gave for such a value."""
        if self.place == len(self._given):
            iterator: Any = self.iterator
            self._given.append(next(iterator) if value is None else iterator.send(value))
        self.place += 1
        return self._given[self.place - 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)

    def seek(self, place: int) -> None:
        """Go on from a place."""
        self.place = place
