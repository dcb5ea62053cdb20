# SPDX-License-Identifier: Apache-2.0
"""Every public function and class of both packages is used by a test, and defaults are kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from public_names import PACKAGES, ROOT, defaults, public_names, unused, used_by

TABLE = json.loads((Path(__file__).parent / "public_defaults.json").read_text())


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_is_used_by_a_test(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = ROOT / "packages" / package / "tests"
    used = [found for path in tests.rglob("*.py") for found in used_by(path.read_text())]
    if package == "torchopt":  # the table of optimizers is read from the index
        monkeypatch.syspath_prepend(str(tests))
        rows = importlib.import_module("optimizers").ROWS.values()
        used += [made for row in rows for made in (row.functional, row.classic, row.meta)]
    assert len(public_names(package)) > 100
    assert unused(package, {id(found): found for found in used}) == []


def test_what_counts_as_use() -> None:
    import optree

    def uses(source: str) -> bool:
        return any(found is optree.tree_map for found in used_by(source))

    assert uses("import optree\noptree.tree_map(f, t)")
    assert uses("import optree.pytree as p\ndef test(): return p.map(f, t)")
    assert uses("from optree import tree_map as m\nTABLE = {'map': m}")
    assert uses("import optree\nfor name in ['tree_map']: getattr(optree, name)(f, t)")
    assert not uses("from optree import tree_map")
    assert not uses("import optree\nTABLE = {'tree_map': 1}")
    assert not uses("import optree\ndef test(f: optree.tree_map) -> optree.tree_map: ...")
    assert not uses("tree_map = print\ntree_map(1)")


@pytest.mark.parametrize("package", PACKAGES)
def test_numbers_that_are_taken_by_default_stay(package: str) -> None:
    """A changed default changes programs that rely on it: update the table deliberately with
    `python tools/public_names.py`, and describe the change in the changelog.
    """
    table, found = TABLE[package], defaults(package)
    assert len(table) > 20
    assert {name: found.get(name) for name in table} == table
