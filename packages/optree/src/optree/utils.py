# SPDX-License-Identifier: Apache-2.0
"""Small sequence functions shared by the package and imported by its clients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable


T = TypeVar("T")
S = TypeVar("S")


def _qualified_name_and_value(value: object) -> tuple[str, object]:
    cls = value.__class__
    return f"{cls.__module__}.{cls.__qualname__}", value


def total_order_sorted(
    iterable: Iterable[T],
    /,
    *,
    key: Callable[[T], Any] | None = None,
    reverse: bool = False,
) -> list[T]:
    """Return the items of ``iterable`` sorted, whether or not their types are comparable.

    Three orders are tried, and the first one that is defined for all items is used:

    1. the order of the items (or of ``key(item)``);
    2. the order of the pairs ``(qualified name of the type, item)``, which keeps items of different
       types apart and compares within one type only;
    3. the order of the input.

    Each attempt sorts a copy with Python's stable sort, so a failed attempt leaves no trace.

    Args:
        iterable: The items to sort.
        key: Computes the value to compare from an item. The item itself is compared if not given.
        reverse: Whether to sort in descending order. The third order ignores it.

    Returns:
        A new list.

    Raises:
        Exception: Whatever ``key`` or a comparison raises, other than :class:`TypeError`.

    Examples:
        >>> total_order_sorted([3, 1, 2])
        [1, 2, 3]
        >>> total_order_sorted([3, 'b', 1, 'a'])
        [1, 3, 'a', 'b']
        >>> total_order_sorted([2j, 1, 1j])
        [2j, 1, 1j]
    """
    items = list(iterable)
    values = items if key is None else [key(item) for item in items]
    # Indices are sorted, so that `key` has run already and a TypeError comes from a comparison.
    indices = range(len(items))
    try:
        order = sorted(indices, key=values.__getitem__, reverse=reverse)  # type: ignore[arg-type]
    except TypeError:
        named = [_qualified_name_and_value(value) for value in values]
        try:
            order = sorted(indices, key=named.__getitem__, reverse=reverse)
        except TypeError:
            return items
    return [items[index] for index in order]


def safe_zip(*args: Iterable[Any]) -> zip[tuple[Any, ...]]:
    """Return ``zip(*args)`` after checking that all arguments have the same number of items.

    Args:
        *args: Iterables. They are read completely before this function returns.

    Returns:
        An iterator over tuples with one item of each argument.

    Raises:
        ValueError: If the lengths differ.

    Examples:
        >>> list(safe_zip([1, 2], 'ab'))
        [(1, 'a'), (2, 'b')]
        >>> safe_zip([1, 2], 'abc')
        Traceback (most recent call last):
            ...
        ValueError: length mismatch: [2, 3]
    """
    sequences = [list(arg) for arg in args]
    lengths = [len(sequence) for sequence in sequences]
    if len(set(lengths)) > 1:
        raise ValueError(f"length mismatch: {lengths}")
    return zip(*sequences)


def unzip2(xys: Iterable[tuple[T, S]], /) -> tuple[tuple[T, ...], tuple[S, ...]]:
    """Split an iterable of pairs into the tuple of first and the tuple of second items.

    Args:
        xys: An iterable of pairs, possibly empty.

    Returns:
        Two tuples of equal length.

    Raises:
        ValueError: If an item does not unpack into two values.

    Examples:
        >>> unzip2([(1, 'a'), (2, 'b')])
        ((1, 2), ('a', 'b'))
        >>> unzip2([])
        ((), ())
    """
    xs: list[T] = []
    ys: list[S] = []
    for x, y in xys:
        xs.append(x)
        ys.append(y)
    return tuple(xs), tuple(ys)
