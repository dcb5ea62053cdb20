# SPDX-License-Identifier: Apache-2.0
"""mypy infers the types asserted by the files in ``cases/`` and rejects the calls marked as wrong.

Each case is ordinary code with ``assert_type(expression, type)``. Calls that must be rejected
carry ``# type: ignore[code]``, which mypy reports as unused if it accepts the call.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import optree

pytest.importorskip("mypy", reason="mypy checks the static types")

CASES = sorted((Path(__file__).parent / "cases").glob("infer_*.py"))
LINE = re.compile(r"^(?P<file>.+?):(?P<line>\d+): error: (?P<message>.*)$")

WRONG = """\
from typing_extensions import assert_type

import optree

assert_type(optree.tree_leaves([1]), list[str])
optree.tree_leaves([1])  # type: ignore[arg-type]
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return the messages of mypy for each case and for a wrong file, by file name."""
    folder = tmp_path_factory.mktemp("static-types")
    wrong = folder / "wrong.py"
    wrong.write_text(WRONG, encoding="utf-8")
    environment = dict(os.environ)
    sources = Path(optree.__file__).resolve().parent.parent
    options = ["--python-executable", sys.executable]
    # mypy finds installed packages by their `py.typed`, and refuses them on MYPYPATH.
    if sources.name not in ("site-packages", "dist-packages"):
        environment["MYPYPATH"] = str(sources)
        # The libraries of `optree.integrations` are Any then: no case uses them, and mypy reads
        # torch for a minute.
        options = ["--no-site-packages", "--ignore-missing-imports"]
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file=", *options),
            *("--cache-dir", str(folder / "cache")),
            *("--follow-imports", "silent", "--no-error-summary", "--no-pretty"),
            *map(str, [*CASES, wrong]),
        ],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert finished.returncode in (0, 1), finished.stdout + finished.stderr
    found: dict[str, list[str]] = defaultdict(list)
    for line in finished.stdout.splitlines():
        match = LINE.match(line)
        if match is not None:
            found[Path(match["file"]).name].append(f"{match['line']}: {match['message']}")
    return found


def test_there_are_cases() -> None:
    assert {case.stem for case in CASES} >= {"infer_leaves", "infer_map", "infer_registry"}


def test_a_wrong_expectation_is_reported(errors: dict[str, list[str]]) -> None:
    inferred, unused = errors["wrong.py"]
    assert '5: Expression is of type "list[int]", not "list[str]"' in inferred
    assert "6: Unused" in unused


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_inferred_types(case: Path, errors: dict[str, list[str]]) -> None:
    assert errors.get(case.name, []) == []
