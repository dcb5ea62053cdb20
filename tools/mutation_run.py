# SPDX-License-Identifier: Apache-2.0
"""Run tests for `tools/mutation.py`: record which test runs which line, and test a change.

Every run is a fork of a process that has imported torch and pytest but neither package, so it
starts immediately. A changed module is compiled from text in memory; no file is written.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import os
import pickle
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coverage
import pytest

__all__ = ["Lines", "judge", "recorded", "test_files", "tests_of", "warm_up"]

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "mutation"
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--rootdir", str(ROOT)]
OPTIONS += ["-m", "not slow and not exhaustive"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins that the fork has

#: Lines of a file -> tests that run them; the tests' times are beside them.
Lines = dict[str, dict[int, list[str]]]


def warm_up() -> None:
    """Import everything that the test runs need except the packages under test."""
    import doctest  # noqa: F401
    import unittest.mock  # noqa: F401

    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import torch

    torch.set_num_threads(1)
    loaded = {name.partition(".")[0] for name in sys.modules}
    if loaded & {"optree", "torchopt"}:
        raise SystemExit("expected a process without the packages, found them imported")


def in_child(work: Callable[[], int], limit: float) -> int | None:
    """Return the exit status of `work` in a fork, negative for a signal; None if it was stopped.

    It is stopped after `limit` seconds of processor time, which do not depend on the load of the
    machine, or if it has not ended after four times as long and a minute.
    """
    child = os.fork()
    if child == 0:
        status = 3
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 5))
            printed = os.open(
                BUILD / f"printed{os.getppid()}.txt", os.O_RDWR | os.O_CREAT | os.O_TRUNC
            )
            for stream in (0, 1, 2):
                os.dup2(printed, stream)
            os.chdir(ROOT)
            status = work()
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60 + 4 * limit
    while time.monotonic() < deadline:
        ended, how = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(how)
            return None if status == -signal.SIGXCPU else status
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def processor_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    return sum(os.times()[:4])


# --- which test runs which line -------------------------------------------------------------------


class _Recorder:
    """Records the processor time of each test and the lines that it runs."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files
        self.passed: set[str] = set()
        self.seconds: dict[str, float] = {}
        self.coverage = coverage.Coverage(
            data_file=None, include=[str(ROOT / f) for f in files], config_file=False
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        started = processor_seconds()
        try:
            return (yield)
        finally:
            self.coverage.switch_context("")
            if item.nodeid in self.passed:
                self.seconds[item.nodeid] = processor_seconds() - started

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def lines(self) -> Lines:
        """Return the lines of each file with the passing tests that run them."""
        data, found = self.coverage.get_data(), Lines()
        for file in self.files:
            by_line = data.contexts_by_lineno(str(ROOT / file))
            found[file] = {n: [t for t in tests if t in self.seconds]
                           for n, tests in by_line.items()}  # fmt: skip
        return found


def _record(test_file: str, files: Sequence[str], where: Path) -> int:
    recorder = _Recorder(files)
    recorder.coverage.start()
    options = [option for option in OPTIONS if option != "-x"]
    status = pytest.main([*options, test_file], plugins=[recorder])
    recorder.coverage.stop()
    where.write_bytes(pickle.dumps((recorder.seconds, recorder.lines())))
    return int(status)


def record(test_file: str, files: Sequence[str], limit: float) -> Path:
    """Return the file that records which lines of `files` each test of a file runs.

    The tests run only if there is no recording. It is valid until one of the files changes.
    """
    text = b"".join((ROOT / name).read_bytes() for name in (test_file, *files))
    digest = hashlib.sha256(text + repr((test_file, files)).encode()).hexdigest()[:16]
    where = BUILD / "lines" / f"{digest}.pickle"
    if not where.exists():
        where.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        status = in_child(lambda: _record(test_file, files, where), limit)
        print(f"  {time.monotonic() - started:6.1f} s  {test_file}"
              + ("" if status == 0 else f"  (pytest: {status})"), flush=True)  # fmt: skip
        if not where.exists():
            raise RuntimeError(f"expected {test_file} to finish in {limit} s, but it did not")
    return where


def test_files(tests: Sequence[str]) -> list[str]:
    """Return the test files among files and folders of tests."""
    return sorted(
        str(path.relative_to(ROOT))
        for test in tests
        for path in ([ROOT / test] if test.endswith(".py") else (ROOT / test).rglob("test_*.py"))
    )


def recorded(
    tests: Sequence[str], files: Sequence[str], limit: float, each: Callable[..., Any] = map
) -> tuple[dict[str, float], Lines]:
    """Return the time of each test that passes, and the tests of each line of `files`.

    Args:
        tests: Files and folders of tests.
        files: Sources.
        limit: The processor time that one test file may take, in seconds.
        each: `map`, or the `map` method of a pool of processes.
    """
    every = test_files(tests)
    seconds: dict[str, float] = {}
    lines: Lines = {file: defaultdict(list) for file in files}
    n = len(every)
    for where in each(record, every, [list(files)] * n, [limit] * n):
        times, found = pickle.loads(where.read_bytes())
        seconds.update(times)
        for file, by_line in found.items():
            for number, names in by_line.items():
                lines[file][number].extend(names)
    return seconds, lines


# --- whether a test detects a change --------------------------------------------------------------


def statement_at(source: str, line: int) -> range:
    """Return the lines of the innermost statement at a line, without the body of a compound one."""
    found = range(line, line + 1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            end = body[0].lineno if body else (node.end_lineno or 0) + 1
            found = range(node.lineno, max(end, node.lineno + 1)) if line < end else found
    return found


def is_in_function(source: str, line: int) -> bool:
    """Return whether a line is in the body of a function, so that it runs not only at import."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return any(
        isinstance(node, functions) and node.body[0].lineno <= line <= (node.end_lineno or 0)
        for node in ast.walk(ast.parse(source))
    )


def tests_of(
    file: str, line: int, seconds: dict[str, float], lines: Lines, budget: float
) -> list[str]:
    """Return the tests that run a line, the fastest first, up to a total of `budget` seconds.

    A line that runs at import counts as run by all tests: first by those that run a line of the
    file and those of the tools, which look at signatures, then by the others.
    """
    source = (ROOT / file).read_text()
    inside = is_in_function(source, line)
    numbers = statement_at(source, line) if inside else lines[file]
    names = {name for number in numbers for name in lines[file].get(number, ())}
    names |= set() if inside else {name for name in seconds if name.startswith("tools/")}
    chosen: list[str] = []
    left = budget
    tried = names if inside else seconds
    for name in sorted(tried, key=lambda name: (name not in names, seconds[name], name)):
        left -= seconds[name]
        if chosen and left < 0:
            break
        chosen.append(name)
    return chosen


class _Chosen:
    """Runs the chosen tests, in their order: files, tests with all their parameters, or one."""

    def __init__(self, names: Sequence[str]) -> None:
        self.order = {name: place for place, name in enumerate(names)}

    def place(self, item: pytest.Item) -> int | None:
        """Return the place of a test in the order, or None."""
        test, file = item.nodeid.partition("[")[0], item.nodeid.partition("::")[0]
        return next((self.order[x] for x in (item.nodeid, test, file) if x in self.order), None)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [(place, item) for item in items if (place := self.place(item)) is not None]
        items[:] = [item for _, item in sorted(kept, key=lambda pair: pair[0])]


def _test_changed(file: str, text: str, names: Sequence[str]) -> int:
    path, plain = str(ROOT / file), importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, fullname: str) -> Any:
        if os.path.realpath(self.path) == path:
            return compile(text, path, "exec", dont_inherit=True)
        return plain(self, fullname)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    files = sorted({name.partition("::")[0] for name in names})
    return int(pytest.main([*OPTIONS, *files], plugins=[_Chosen(names)]))


def judge(file: str, text: str, names: Sequence[str], limit: float) -> str:
    """Test a file with changed text and return the outcome: survived, or how it was caught."""
    if not names:
        return "survived"
    try:
        compile(text, file, "exec")
    except SyntaxError:
        return "incompetent"
    status = in_child(lambda: _test_changed(file, text, names), limit)
    if status is None:
        return "timeout"
    return {0: "survived", 5: "survived"}.get(status, "caught" if status == 1 else "incompetent")
