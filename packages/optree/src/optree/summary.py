# SPDX-License-Identifier: Apache-2.0
"""Summaries of trees: types, shapes, dtypes, bytes and counts of every subtree."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from optree.ops import tree_flatten_one_level, tree_is_leaf, tree_structure

__all__ = ["TreeSummary", "tree_summary"]


@dataclass
class _Row:
    level: int
    parent: int  # the index of the row of the parent; -1 at the root
    name: str
    what: str
    leaves: int
    size: int


class TreeSummary:
    """The lines of :func:`tree_summary`: text where it is printed, a table in notebooks."""

    def __init__(self, rows: list[_Row]) -> None:
        self._rows = rows

    def _cells(self) -> list[tuple[str, str, str, str]]:
        return [
            ("  " * row.level + row.name, row.what, f"{row.leaves:,}", f"{row.size:,}")
            for row in self._rows
        ]

    def __repr__(self) -> str:
        lines = [("tree", "type", "leaves", "bytes"), *self._cells()]
        name, what, leaves, size = (max(map(len, column)) for column in zip(*lines))
        return "\n".join(
            f"{a:{name}}  {b:{what}}  {c:>{leaves}}  {d:>{size}}" for a, b, c, d in lines
        )

    def _repr_html_(self) -> str:
        titles = "".join(f"<th>{title}</th>" for title in ("tree", "type", "leaves", "bytes"))
        lines = (
            "<tr>" + "".join(f"<td><pre>{html.escape(cell)}</pre></td>" for cell in cells) + "</tr>"
            for cells in self._cells()
        )
        return f"<table><tr>{titles}</tr>{''.join(lines)}</table>"


def _attribute(leaf: Any, name: str) -> Any:
    """Return an attribute, or None if this object does not have it."""
    try:
        return getattr(leaf, name, None)
    except Exception:  # such as the RuntimeError of a sparse tensor
        return None


def _leaf_text(leaf: Any) -> str:
    name = type(leaf).__name__
    shape, dtype = _attribute(leaf, "shape"), _attribute(leaf, "dtype")
    if not isinstance(shape, tuple):
        return name
    return f"{name} {dtype}[{', '.join(map(str, shape))}]"


def tree_summary(
    tree: Any,
    /,
    *,
    depth: int | None = None,
    is_leaf: Callable[[Any], bool] | None = None,
    none_is_leaf: bool = False,
    namespace: str = "",
) -> TreeSummary:
    """Return a summary of a tree that prints as lines and shows as a table in notebooks.

    The line of a leaf has its type and, for arrays, dtype, shape and bytes. The line of a container
    has the number of leaves below it and their total bytes. An array that occurs in two places
    counts twice. A leaf without ``nbytes``, such as a sparse tensor of PyTorch, counts 0 bytes.

    Args:
        tree: The tree.
        depth: How many levels below the root are shown, at least 0. By default all are. Totals
            include the levels that are not shown.
        is_leaf: See :func:`optree.tree_flatten`.
        none_is_leaf: See :func:`optree.tree_flatten`.
        namespace: See :func:`optree.tree_flatten`.

    Returns:
        A :class:`TreeSummary`: ``repr`` is the text, and notebooks show a table.

    Raises:
        ValueError: If ``depth`` is negative.
        Exception: The errors of :func:`optree.tree_flatten`.

    Examples:
        >>> tree_summary({'layer': {'bias': 0, 'weight': [1.0, 2.0]}}, depth=2)
        tree            type  leaves  bytes
        *               dict       3      0
          ['layer']     dict       3      0
            ['bias']    int        1      0
            ['weight']  list       2      0
    """
    if depth is not None and depth < 0:
        raise ValueError(f"expected depth >= 0 or None, got {depth}")
    options: dict[str, Any] = {"none_is_leaf": none_is_leaf, "namespace": namespace}
    tree_structure(tree, is_leaf, **options)  # raises if the tree contains itself
    rows: list[_Row] = []
    todo: list[tuple[int, int, str, Any]] = [(0, -1, "*", tree)]
    while todo:
        level, parent, name, node = todo.pop()
        if tree_is_leaf(node, is_leaf, **options):
            size = _attribute(node, "nbytes")
            size = size if isinstance(size, int) else 0
            rows.append(_Row(level, parent, name, _leaf_text(node), 1, size))
            continue
        rows.append(_Row(level, parent, name, type(node).__name__, 0, 0))
        made = tree_flatten_one_level(node, **options)
        names = [
            made.path_entry_type(entry, made.type, made.kind).codify("") for entry in made.entries
        ]
        here = len(rows) - 1
        below = [(level + 1, here, *pair) for pair in zip(names, made.children)]
        todo.extend(reversed(below))
    for row in reversed(rows):
        if row.parent >= 0:
            rows[row.parent].leaves += row.leaves
            rows[row.parent].size += row.size
    return TreeSummary([row for row in rows if depth is None or row.level <= depth])
