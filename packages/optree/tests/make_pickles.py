# SPDX-License-Identifier: Apache-2.0
"""Write the pickle files of ``tests/pickles`` with the optree installed in this interpreter.

Run it with the published optree 0.20.0, in a private environment, from this directory:

    python make_pickles.py pickles

Each file holds the structure of one row of the table of trees; the protocol is in its name.
``*-old.pickle`` holds the layout that releases before 0.20 wrote: node states of seven items.
"""

from __future__ import annotations

import copyreg
import io
import pickle
import sys
from pathlib import Path
from typing import Any

from trees import TREES

import optree

PROTOCOLS = (0, 2, 4, 5)
# Long and machine-dependent rows would only make the files larger.
SKIPPED = frozenset({"wide", "wide_dict", "deep", "comb"})


def reduce_as_older_releases(treespec: optree.PyTreeSpec) -> tuple[Any, ...]:
    """Return the pickle parts of an older release: no original key order per node."""
    nodes, none_is_leaf, namespace = treespec.__getstate__()
    state = (tuple(node[:7] for node in nodes), none_is_leaf, namespace)
    return copyreg.__newobj__, (optree.PyTreeSpec,), state  # type: ignore[attr-defined]


def dump_as_older_releases(treespec: optree.PyTreeSpec, protocol: int) -> bytes:
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol)
    pickler.dispatch_table = {optree.PyTreeSpec: reduce_as_older_releases}
    pickler.dump(treespec)
    return buffer.getvalue()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row in TREES:
        if row.name in SKIPPED:
            continue
        treespec = optree.tree_structure(
            row.make(), none_is_leaf=len(row.name) % 2 == 0, namespace=row.namespace
        )
        protocol = PROTOCOLS[len(row.name) % len(PROTOCOLS)]
        (folder / f"{row.name}-p{protocol}.pickle").write_bytes(pickle.dumps(treespec, protocol))
        if protocol == 2:
            old = dump_as_older_releases(treespec, protocol)
            (folder / f"{row.name}-old.pickle").write_bytes(old)
    print(f"wrote {len(list(folder.iterdir()))} files with optree {optree.__version__}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
