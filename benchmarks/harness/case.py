# SPDX-License-Identifier: Apache-2.0
"""A case made ready to be timed in a rival's process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable


class UnsupportedError(Exception):
    """The rival has no such operation; the text says so in the table."""


@dataclass
class Prepared:
    """A case that is ready to be timed.

    Attributes:
        statement: the Python statement to time.
        names: the names it uses.
        digest: a text that equal answers share, None if the case checked itself.
        repetitions: operations in one run of the statement.
        renew: run, untimed, before every run of the statement, for cases that must not see
            the same input twice; None where the statement may be run in a loop.
        clock: the clock to time with, for statements that work in threads of their own; by default
            the worker's, which is that of its thread.
    """

    statement: str
    names: dict[str, Any]
    digest: str | None = None
    repetitions: int = 1
    renew: Callable[[], None] | None = None
    clock: Callable[[], float] | None = None
