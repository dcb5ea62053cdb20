# SPDX-License-Identifier: Apache-2.0
"""The competitors: one module each with the same names.

Every module has `flatten(tree)`, `unflatten` and `map_(function, tree)`, the library's own
public functions without a wrapper around them; `parts(tree)` -> (leaves, spec) and
`rebuild(spec, leaves)` for checks; statements for what it spells differently; and what it
does differently: `NONE_IS_LEAF`, `SORTS_DICT`, `SORTS_ORDERED_DICT`, `HAS_SPECS`.

Differences that the checks allow for and that the reader of a table should know:

* torch and dm-tree treat None as a leaf, so on trees with empty entries (the module trees)
  they handle some more leaves.
* torch keeps the insertion order of dicts, so it never sorts keys; the others sort them.
* dm-tree sorts OrderedDicts too, and keeps no spec: its `unflatten` gets an example tree.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.harness.rival import Rival

PUBLISHED = "optree==0.20.0"
_HERE = "benchmarks.optree.rivals"
_TORCH = "torch==2.13.0"

OURS = "optree"


def rivals(ours_site: Path | None = None, ours_python: str | None = None) -> list[Rival]:
    """Return the table of competitors, ours first.

    Args:
        ours_site: a folder that holds our optree, instead of the interpreter's packages.
        ours_python: the interpreter that runs ours, the running one by default.
    """
    return [
        Rival(
            OURS,
            "optree",
            f"{_HERE}.optree_api",
            site=ours_site,
            python=ours_python or sys.executable,
        ),
        Rival("optree-0.20.0", "optree 0.20.0", f"{_HERE}.optree_api", (PUBLISHED,)),
        Rival("optree-0.11.0", "optree 0.11.0", f"{_HERE}.optree_api", ("optree==0.11.0",)),
        Rival("jax", "jax", f"{_HERE}.jax_tree_util", ("jax==0.10.2", "jaxlib==0.10.2")),
        Rival("torch", "torch _pytree", f"{_HERE}.torch_pytree", (PUBLISHED,), (_TORCH,)),
        Rival(
            "torch-cxx", "torch _cxx_pytree", f"{_HERE}.torch_cxx_pytree", (PUBLISHED,), (_TORCH,)
        ),
        Rival("dm-tree", "dm-tree", f"{_HERE}.dm_tree", ("dm-tree==0.1.10",)),
    ]
