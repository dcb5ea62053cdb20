# SPDX-License-Identifier: Apache-2.0
"""Type checkers infer what the files in ``cases/`` assert, and reject what they mark as wrong.

Calls that must be rejected have ``# type: ignore[code]``, which mypy reports as unused if it
accepts the call.
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
import torchopt

pytest.importorskip("mypy", reason="mypy checks the static types")

CASES = sorted((Path(__file__).parent / "cases").glob("infer_*.py"))
LINE = re.compile(r"^(?P<file>.+?):(?P<line>\d+): error: (?P<message>.*)$")

WRONG = """\
from typing_extensions import assert_type

import torchopt

assert_type(torchopt.adam(), torchopt.Adam)
torchopt.MetaLion  # type: ignore[attr-defined]
torchopt.lion(lr=0.1)  # type: ignore[call-arg]
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return what mypy says about each case and about a file that is wrong, by file name."""
    folder = tmp_path_factory.mktemp("static-types")
    wrong = folder / "wrong.py"
    wrong.write_text(WRONG, encoding="utf-8")
    environment = dict(os.environ)
    sources = [Path(package.__file__ or "").resolve().parents[1] for package in (torchopt, optree)]
    options = ["--python-executable", sys.executable]
    # Installed packages are found by their `py.typed`; mypy refuses them on its path.
    if sources[0].name not in ("site-packages", "dist-packages"):
        environment["MYPYPATH"] = os.pathsep.join(map(str, sources))
        # Tensors are Any then: nothing here is about them, and mypy reads torch for a minute.
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


def test_a_wrong_expectation_is_reported(errors: dict[str, list[str]]) -> None:
    inferred, *unused = errors["wrong.py"]
    assert inferred == (
        '5: Expression is of type "GradientTransformation", not "Adam"  [assert-type]'
    )
    assert [text[:9] for text in unused] == ["6: Unused", "7: Unused"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_inferred_types(case: Path, errors: dict[str, list[str]]) -> None:
    assert errors.get(case.name, []) == []
