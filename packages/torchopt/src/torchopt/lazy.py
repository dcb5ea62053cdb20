# SPDX-License-Identifier: Apache-2.0
"""Attributes that are computed when they are first read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

__all__ = ["lazy"]

T = TypeVar("T")


class lazy(Generic[T]):  # noqa: N801 - a decorator
    """An attribute that is computed when it is first read, and then kept.

    It is `functools.cached_property` without the lock that it has before Python 3.12, which
    `torch.compile` cannot trace. Two threads may both compute the value.

    Example:
        >>> class Square:
        ...     side = 3
        ...
        ...     @lazy
        ...     def area(self) -> int:
        ...         return self.side**2
        >>> Square().area
        9
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.name = compute, compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, instance: None, owner: Any = None) -> lazy[T]: ...

    @overload
    def __get__(self, instance: object, owner: Any = None) -> T: ...

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Return the value, and put it in place of this descriptor."""
        if instance is None:
            return self
        value = self.compute(instance)
        object.__setattr__(instance, self.name, value)  # also of a frozen dataclass
        return value
