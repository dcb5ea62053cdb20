# SPDX-License-Identifier: Apache-2.0
"""The stubs of torchopt's optimizers are current, and the generator finds differences."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

make_stubs = pytest.importorskip("make_stubs")


def test_stubs_are_current() -> None:
    assert make_stubs.main(["--check"]) == 0, "run python tools/make_stubs.py"


def test_a_stub_that_is_not_current_is_reported_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in make_stubs.stubs():
        copy = tmp_path / path.relative_to(make_stubs.SOURCE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(make_stubs, "SOURCE", tmp_path)
    stub = tmp_path / "torchopt" / "optim" / "__init__.pyi"
    current = stub.read_text(encoding="utf-8")
    stub.write_text(current.replace("class Lion", "class Lyon"), encoding="utf-8")
    assert make_stubs.main(["--check"]) == 1
    assert capsys.readouterr().out.startswith("torchopt/optim/__init__.pyi: not current")
    assert make_stubs.main([]) == 0
    assert stub.read_text(encoding="utf-8") == current
    assert make_stubs.main(["--check"]) == 0


def test_lines_are_short_and_the_text_is_python() -> None:
    for text in make_stubs.stubs().values():
        ast.parse(text)
        assert max(map(len, text.splitlines())) <= 100
