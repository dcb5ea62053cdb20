# SPDX-License-Identifier: Apache-2.0
"""Iterators that can be rewound, for a loss that is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["Recorder"]


class Recorder:
    """An iterator that keeps the values it yielded and can yield them again."""

    not_searched = True  # the recorded values are not state of the function

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator, self._given, self.place = iterator, [], 0  # type: ignore[var-annotated]

    def __iter__(self) -> Recorder:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def send(self, value: Any) -> Any:
        """Return the next value of the iterator, or the recorded one at this place."""
        if self.place == len(self._given):
            iterator: Any = self.iterator
            self._given.append(next(iterator) if value is None else iterator.send(value))
        self.place += 1
        return self._given[self.place - 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)

    def seek(self, place: int) -> None:
        """Continue from a place."""
        self.place = place
