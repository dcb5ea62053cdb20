# SPDX-License-Identifier: Apache-2.0
"""Record which public functions and classes of both packages the tests call.

``tools/tests/public_calls.json`` names tests that call public functions and classes. This program
runs those tests, with a profiler that sees each Python function and each function of the extension
modules, and fails if a public name was not called, in the table or not:

    python tools/record_calls.py                   # minutes
    python tools/record_calls.py --store [PATHS]   # run the tests in PATHS, complete the table

Calls in other processes are not seen. A class counts as called if one of its own methods runs.
Names without code of their own, such as most errors, cannot be seen.
`tools/tests/test_public_names.py` reads the tests instead.
"""

from __future__ import annotations

import argparse
import cProfile
import inspect
import json
import sys
import time
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any, Union

import pytest

from public_names import PACKAGES, ROOT, object_of, public_callables

__all__ = ["TABLE", "is_away", "marks_of", "visible"]

TABLE = ROOT / "tools" / "tests" / "public_calls.json"
OPTIONS = ["-q", "-p", "no:cacheprovider", "--no-header", "-m", "not exhaustive"]


#: The code of a function without a body: what stands for it is made by its decorator.
NOTHING = (lambda: None).__code__
#: What the profiler records for a call: the identity of a code object, or the text of a C function.
Mark = Union[int, str]


def marks_of(member: Any) -> set[Mark]:
    """Return the marks of a function, or of the methods of a class."""
    found = inspect.unwrap(member)
    if isinstance(found, type):
        return {id(code) for own in vars(found).values() for code in codes_of(own)}
    if hasattr(found, "__code__"):
        return {id(code) for code in codes_of(found)}
    return {f"<built-in method {found.__module__}.{found.__name__}>"}


def codes_of(member: Any) -> Iterator[CodeType]:
    """Yield the code of a function, a method or a property."""
    parts = (member.fget, member.fset) if isinstance(member, property) else (member,)
    for part in parts:
        method = getattr(part, "__func__", part)  # of a class method, which cannot be called itself
        found = inspect.unwrap(method) if callable(method) else None
        code = getattr(found, "__code__", None)
        if isinstance(code, CodeType) and len(code.co_code) > len(NOTHING.co_code):
            yield code


def visible(package: str) -> dict[str, set[Mark]]:
    """Return the marks of each public function and class that no other one shares, by name.

    Equal code is not the same code: code objects are compared by their identities.
    """
    every = public_callables(package)
    owners: dict[Mark, set[int]] = {}
    for member in every.values():
        for mark in marks_of(member):
            owners.setdefault(mark, set()).add(id(member))
    own = {n: {m for m in marks_of(x) if len(owners[m]) == 1} for n, x in every.items()}
    return {name: marks for name, marks in own.items() if marks}


def is_away(name: str) -> bool:
    """Return whether a name belongs to a module whose library is not installed."""
    return object_of(name.rpartition(".")[0]) is None


class Calls:
    """A plugin that keeps, for each public name, the fastest test that calls it."""

    def __init__(self) -> None:
        self.names: dict[Mark, list[str]] = {}
        self.found: dict[str, tuple[float, str]] = {}
        for package in PACKAGES:
            for name, marks in visible(package).items():
                for mark in marks:
                    self.names.setdefault(mark, []).append(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Record what one test calls."""
        profile, started = cProfile.Profile(), time.process_time()
        profile.enable()
        try:
            return (yield)
        finally:
            profile.disable()
            seconds = time.process_time() - started
            codes = (entry.code for entry in profile.getstats())
            recorded = [code if isinstance(code, str) else id(code) for code in codes]
            self.take(item.nodeid.partition("[")[0], seconds, recorded)

    def take(self, test: str, seconds: float, recorded: Iterable[Mark]) -> None:
        """Record a test."""
        for mark in recorded:
            for name in self.names.get(mark, ()):
                if name not in self.found or seconds < self.found[name][0]:
                    self.found[name] = seconds, test

    def missing(self) -> list[str]:
        """Return the names that no test has called."""
        every = {name for names in self.names.values() for name in names}
        return sorted(every - self.found.keys())


def main() -> int:
    """Run the tests of the table, or complete it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", action="store_true", help=f"write {TABLE.name}")
    parser.add_argument("paths", nargs="*", help="with --store: the tests to run; all by default")
    options = parser.parse_args()
    table: dict[str, str] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    calls = Calls()
    tests = options.paths if options.store else sorted(set(table.values()))
    status = int(pytest.main([*OPTIONS, *tests], plugins=[calls]))
    if options.store:
        every = {name for names in calls.names.values() for name in names}
        table = {**table, **{name: test for name, (_, test) in calls.found.items()}}
        table = {name: table[name] for name in sorted(table) if name in every or is_away(name)}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        missing = sorted(every - table.keys())
    else:
        missing = calls.missing()
    print(f"\n{len(calls.found)} public functions and classes were called")
    for name in missing:
        print(f"not called by a test: {name}")
    return status or int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
