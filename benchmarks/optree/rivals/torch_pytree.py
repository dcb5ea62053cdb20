# SPDX-License-Identifier: Apache-2.0
"""torch.utils._pytree, torch's pytree library in Python."""

from __future__ import annotations

import importlib
from typing import Any, Callable

from benchmarks.optree.rivals import torch_names

DISTRIBUTIONS = ("torch",)
NONE_IS_LEAF = True
SORTS_DICT = False
SORTS_ORDERED_DICT = False
HAS_SPECS = True
COMPARABLE = False

library: Any = importlib.import_module("torch")
pytree: Any = importlib.import_module("torch.utils._pytree")

flatten: Callable[..., Any] = pytree.tree_flatten
unflatten: Callable[..., Any] = pytree.tree_unflatten
map_: Callable[..., Any] = pytree.tree_map
parts = flatten


def rebuild(spec: Any, leaves: Any) -> Any:
    """Return the tree of these leaves; torch takes the leaves first."""
    return unflatten(leaves, spec)


torch_names.register(pytree)
STATEMENTS = torch_names.STATEMENTS
