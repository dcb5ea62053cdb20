# SPDX-License-Identifier: Apache-2.0
"""Every public function and class of both packages is called by a test, and defaults are kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import record_calls
from public_names import PACKAGES, ROOT, called_by, defaults, public_names, uncalled

TABLE = json.loads((Path(__file__).parent / "public_defaults.json").read_text())

# Classes that only the packages make: results, states, entries of paths, and bases of errors.
MADE_INSIDE = {
    "optree": ["optree.integrations.attrs.AttrsEntry", "optree.registry.PyTreeNodeRegistryEntry"],
    "torchopt": [
        "torchopt.diff.verify.Verification",
        "torchopt.diff.verify.VerifyReport",
        "torchopt.diff.zero_order.Estimator",
        "torchopt.diff.zero_order.estimators.Estimator",
        "torchopt.diff.zero_order.low_rank.Factors",
        "torchopt.diff.zero_order.unrolled.UnrolledEstimator",
        "torchopt.errors.MissingExtensionWarning",
        "torchopt.errors.TorchOptError",
        "torchopt.linear_solve.Kronecker",
        "torchopt.optim.named_state.StateGroups",
        "torchopt.optimizers.learned.LearnedLSTMState",
        "torchopt.optimizers.learned.LearnedMLPState",
        "torchopt.params.SecondDerivatives",
    ],
}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_function_and_class_is_called_by_a_test(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = ROOT / "packages" / package / "tests"
    called = [found for path in tests.rglob("*.py") for found in called_by(path.read_text())]
    if package == "torchopt":  # the table of optimizers is read from the index
        monkeypatch.syspath_prepend(str(tests))
        rows = importlib.import_module("optimizers").ROWS.values()
        called += [made for row in rows for made in (row.functional, row.classic, row.meta)]
    assert len(public_names(package)) > 100
    assert uncalled(package, {id(found): found for found in called}) == MADE_INSIDE[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_test_was_seen_to_call_every_public_function_and_class(package: str) -> None:
    """`nox -s calls -- --store` records which test calls a name; `nox -s calls` runs those tests
    again, and fails if one of them no longer does.
    """
    table = json.loads(record_calls.TABLE.read_text())
    recorded = {name: test for name, test in table.items() if name.partition(".")[0] == package}
    assert len(recorded) > 100
    expected = record_calls.visible(package).keys()
    assert sorted(expected - recorded.keys()) == []
    assert [x for x in recorded.keys() - expected if not record_calls.is_away(x)] == []
    for test in set(recorded.values()):
        path, *classes, name = test.split("::")
        source = (ROOT / path).read_text()
        assert f"def {name}(" in source, test
        assert all(f"class {c}" in source for c in classes), test


def test_what_counts_as_a_call() -> None:
    import optree

    def calls(source: str) -> bool:
        return any(found is optree.tree_map for found in called_by(source))

    assert calls("import optree\noptree.tree_map(f, t)")
    assert calls("import optree.pytree as p\ndef test(): return p.map(f, t)")
    assert calls("from optree import tree_map as m\nTABLE = {'map': m}\nTABLE['map'](f, t)")
    assert calls("from optree import tree_map as m\nfor k, f in {'map': m}.items(): f(f, t)")
    assert calls("import optree\n[f(g, t) for f in (optree.tree_map, print)]")
    assert calls("import optree\nfor name in ['tree_map']: getattr(optree, name)(f, t)")
    assert calls("import optree\nrun(optree.tree_map, t)")
    assert calls("import optree\n@optree.tree_map\ndef test(): ...")
    parameters = "import optree, pytest\n@pytest.mark.parametrize('a,f', [(1, optree.tree_map)])\n"
    assert calls(parameters + "def test(a, f): f(g, t)")
    assert not calls(parameters + "def test(a, f): a(g, t)")
    assert not calls("from optree import tree_map")
    assert not calls("import optree\nassert optree.tree_map is not None")
    assert not calls("import optree\ninspect.signature(optree.tree_map)")
    assert not calls("from optree import tree_map as m\nTABLE = {'map': m}")
    assert not calls("import optree\nTABLE = {'tree_map': 1}")
    assert not calls("import optree\ndef test(f: optree.tree_map) -> optree.tree_map: ...")
    assert not calls("tree_map = print\ntree_map(1)")


@pytest.mark.parametrize("package", PACKAGES)
def test_numbers_that_are_taken_by_default_stay(package: str) -> None:
    """A changed default changes programs that rely on it: update the table deliberately with
    `python tools/public_names.py`, and describe the change in the changelog.
    """
    table, found = TABLE[package], defaults(package)
    assert len(table) > 20
    assert {name: found.get(name) for name in table} == table
