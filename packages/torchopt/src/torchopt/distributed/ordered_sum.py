# SPDX-License-Identifier: Apache-2.0
"""A sum whose rounding does not depend on which rank adds which terms.

The terms 0 ... n - 1 are the leaves of a fixed binary tree, and the value of a node is the sum of
its two children. A rank that holds both children adds them. A rank that holds some of the leaves is
left with the few nodes whose siblings are on other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

__all__ = ["Node", "OrderedSum", "nodes_of"]

T = TypeVar("T")

#: (level, index): the terms from index * 2**level to (index + 1) * 2**level - 1.
Node = tuple[int, int]


class OrderedSum(Generic[T]):
    """A part of the sum.

    Args:
        terms: n, the number of terms of the whole sum.
        add: Returns the sum of two neighbours, the left one and the right one.

    Attributes:
        nodes: The known values of nodes whose siblings are not known.

    Example:
        >>> parts = OrderedSum(3, lambda a, b: f"({a}+{b})")
        >>> for i in (2, 1, 0):
        ...     parts.put((0, i), str(i))
        >>> parts.total()
        '((0+1)+2)'
    """

    def __init__(self, terms: int, add: Callable[[T, T], T]) -> None:
        self.terms = terms
        self.add = add
        self.nodes: dict[Node, T] = {}
        self.top = max(terms - 1, 0).bit_length()

    def put(self, node: Node, value: T) -> None:
        """Set the value of a node; nodes come in any order."""
        level, index = node
        while level < self.top:
            sibling = (level, index ^ 1)
            if sibling in self.nodes:
                other = self.nodes.pop(sibling)
                value = self.add(value, other) if index % 2 == 0 else self.add(other, value)
            elif (sibling[1] << level) < self.terms:
                break  # the sibling exists and is not known yet
            level, index = level + 1, index // 2
        self.nodes[level, index] = value

    def total(self) -> T:
        """Return the whole sum."""
        return self.nodes[self.top, 0]


def nodes_of(leaves: Iterable[int], terms: int) -> list[Node]:
    """Return the nodes that remain when the terms `leaves` are added up, sorted.

    Example:
        >>> nodes_of([0, 1, 2, 3, 4], 8)
        [(0, 4), (2, 0)]
    """
    parts: OrderedSum[int] = OrderedSum(terms, lambda a, b: 0)
    for leaf in leaves:
        parts.put((0, leaf), 0)
    return sorted(parts.nodes)
