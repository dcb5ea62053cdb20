# SPDX-License-Identifier: Apache-2.0
"""The messages of dev.py when something is missing, and the changes that make it reinstall."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import environment as env
from check_links import pages

TOOLS = Path(env.__file__).resolve().parent


def run_dev(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOLS / "dev.py"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A minimal checkout that environment.py uses as its root."""
    for package in env.PACKAGES:
        folder = tmp_path / package
        (folder / "cpp").mkdir(parents=True)
        (folder / "src").mkdir()
        (folder / "pyproject.toml").write_text("[project]\n")
        (folder / "CMakeLists.txt").write_text("project(x)\n")
        (folder / "cpp" / "a.cpp").write_text("int a;\n")
        (folder / "src" / "a.py").write_text("a = 1\n")
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "constraints.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(env, "ROOT", tmp_path)
    monkeypatch.setattr(env, "CONSTRAINTS", tmp_path / "tools" / "constraints.txt")
    return tmp_path


def test_an_unknown_task_is_one_sentence_that_names_the_tasks() -> None:
    done = run_dev("tset")
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a task (setup, demo, test, ")
    assert "got 'tset'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_session_is_a_task() -> None:
    source = (TOOLS.parent / "noxfile.py").read_text(encoding="utf-8")
    found = re.findall(r"^@nox.session(?:\(.*?\))?\ndef (\w+)", source, re.MULTILINE)
    sessions = {name.rstrip("_") for name in found} - {"cpp_tests", "tests"}
    assert len(sessions) > 10
    assert set(env.TASKS) == sessions | {"setup", "test"}


def test_every_task_named_in_a_document_exists() -> None:
    root = TOOLS.parent
    texts = [*pages(root), *(root / ".github").rglob("*.yml"), root / ".ci" / "run"]
    for text in texts:
        for task in re.findall(r"tools/dev\.py ([a-z]\w*)", text.read_text(encoding="utf-8")):
            assert task in env.TASKS, f"{text.relative_to(root)}: {task}"


def test_no_task_is_one_sentence() -> None:
    done = run_dev()
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected a task (setup, ")
    assert ", got none; " in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_python_that_torch_does_not_support_is_named() -> None:
    # The check reads sys.version_info; changing it imitates another interpreter.
    script = (
        "import runpy, sys; sys.version_info = (3, 9, 1); sys.argv = ['dev.py', 'test'];"
        f"runpy.run_path({str(TOOLS / 'dev.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected Python 3.10 to 3.14, which torch 2.13.0")
    assert "got Python 3.9" in done.stderr


def test_dev_py_is_written_for_any_python() -> None:
    # No annotations and no f-strings: an old interpreter must reach the version check.
    text = (TOOLS / "dev.py").read_text(encoding="utf-8")
    assert "annotations" not in text
    assert 'f"' not in text


def test_the_pinned_torch_is_the_one_that_the_version_check_names() -> None:
    pins = (TOOLS / "constraints.txt").read_text(encoding="utf-8")
    assert "\ntorch==2.13.0\n" in pins
    assert "torch 2.13.0 " in (TOOLS / "dev.py").read_text(encoding="utf-8")


@pytest.mark.skipif(os.name == "nt", reason="CMake finds Visual Studio without PATH")
def test_no_compiler_on_path_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(env.SetupError, match=r"expected a C\+\+ compiler on PATH .* found none"):
        env.check_compiler()


@pytest.mark.skipif(os.name == "nt", reason="the imitated compiler is a shell script")
def test_a_compiler_without_cpp20_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'unknown option -std=c++20' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(
        env.SetupError, match=r"supports C\+\+20, but .* \(unknown option -std=c\+\+20\)"
    ):
        env.check_compiler()


def test_a_python_without_venv_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(env.SetupError, match="expected the standard module venv .* python3-venv"):
        env.check_machine()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Failed to establish a new connection: [Errno 111]", "expected to reach a package index"),
        (
            "ERROR: No matching distribution found for torch==2.13.0",
            "expected the package index to have",
        ),
        ("error: subprocess-exited-with-error", "pip failed with status 1"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="the imitated pip is a shell script")
def test_a_failed_install_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, expected: str
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho '{output}'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(env, "VENV", tmp_path)
    with pytest.raises(env.SetupError, match=expected):
        env._pip_install(["torch"], "torch")


def test_a_changed_python_file_asks_for_nothing(checkout: Path) -> None:
    before = env.wanted_stamp()
    (checkout / env.PACKAGES[0] / "src" / "a.py").write_text("a = 2\n")
    assert env.wanted_stamp() == before


@pytest.mark.parametrize("name", ["cpp/a.cpp", "cpp/new.h", "CMakeLists.txt"])
def test_a_changed_native_file_asks_for_a_rebuild_only(checkout: Path, name: str) -> None:
    before = env.wanted_stamp()
    (checkout / env.PACKAGES[1] / name).write_text("changed\n")
    after = env.wanted_stamp()
    assert after["native"] != before["native"]
    assert after["environment"] == before["environment"]


@pytest.mark.parametrize("name", ["packages/torchopt/pyproject.toml", "tools/constraints.txt"])
def test_changed_requirements_ask_for_a_new_install(checkout: Path, name: str) -> None:
    before = env.wanted_stamp()["environment"]
    (checkout / name).write_text("changed\n")
    assert env.wanted_stamp()["environment"] != before


def test_a_damaged_stamp_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "STAMP", tmp_path / "stamp.json")
    assert env.read_stamp() == {}
    env.STAMP.write_text("{")
    assert env.read_stamp() == {}
    env.STAMP.write_text('{"native": "1"}')
    assert env.read_stamp() == {"native": "1"}
