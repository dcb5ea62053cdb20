# SPDX-License-Identifier: Apache-2.0
"""dm-tree, imported as `tree`. It keeps no spec: an example tree takes its place."""

from __future__ import annotations

import importlib
from typing import Any, Callable

DISTRIBUTIONS = ("dm-tree",)
NONE_IS_LEAF = True
SORTS_DICT = True
SORTS_ORDERED_DICT = True
HAS_SPECS = False
COMPARABLE = False

library: Any = importlib.import_module("tree")

flatten: Callable[..., Any] = library.flatten
unflatten: Callable[..., Any] = library.unflatten_as
map_: Callable[..., Any] = library.map_structure
rebuild = unflatten


def parts(tree: Any) -> tuple[Any, Any]:
    """Return the leaves, and the tree itself as its own description."""
    return flatten(tree), tree


STATEMENTS: dict[str, str | tuple[str, str]] = {
    "leaves": "flatten(tree)",
    "map_two": "map_(operator.is_, tree, other)",
    "with_path": "library.flatten_with_path(tree)",
    "map_with_path": "library.map_structure_with_path(second, tree)",
    "flatten_up_to": "library.flatten_up_to(spec, other)",
}
