# SPDX-License-Identifier: Apache-2.0
"""A case that is ready to be timed in a rival's process."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable


class UnsupportedError(Exception):
    """The rival has no such operation; the text says so in the table."""


@dataclass
class Prepared:
    """A case that is ready for timing.

    Attributes:
        statement: the Python statement to time.
        names: the names it uses.
        digest: a text that is the same for equal answers; None if the case checked itself.
        repetitions: operations in one run of the statement.
        renew: called, untimed, before every run of the statement, for cases that must not get
            the same input twice; None if the statement may be run in a loop.
        clock: the clock to time with, for statements that work in threads of their own; by default
            the worker's, which is that of its thread.
        facts: results of the check, such as the error of the answer; stored with the times.
    """

    statement: str
    names: dict[str, Any]
    digest: str | None = None
    repetitions: int = 1
    renew: Callable[[], None] | None = None
    clock: Callable[[], float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def describe(rival: Any) -> dict[str, Any]:
    """Return the versions of the distributions of a rival, and where it was imported from."""
    versions = {}
    for name in rival.DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = getattr(rival.library, "__version__", "not installed, imported")
    return {"versions": versions, "file": str(Path(rival.library.__file__).resolve())}


def function_of(rival: Any, name: str) -> Any:
    """Return a function of a rival's module.

    Raises:
        UnsupportedError: the module has no function of this name.
    """
    found = getattr(rival, name, None)
    if found is None:
        raise UnsupportedError("it is about something else")
    return found
