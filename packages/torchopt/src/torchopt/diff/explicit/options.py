# SPDX-License-Identifier: Apache-2.0
"""Checks of how an inner loop is differentiated, kept and executed."""

from __future__ import annotations

from typing import Any

from torchopt.diff.differences import Differences
from torchopt.diff.explicit.budget import in_bytes
from torchopt.diff.explicit.checks import require_count, require_place, require_tasks

__all__ = ["TRACED", "require_options"]

DERIVATIVES = ("reverse", "mixed", "differences", "first_order", "forward")
EXECUTE = ("eager", "blocks", "trace", "compile")
TRACED = ("trace", "compile")  # ways to execute a step as one program


def require_options(loop: Any) -> None:
    """Raise unless the options of an `Explicit` are known and fit together."""
    if not isinstance(loop.derivative, Differences) and loop.derivative not in DERIVATIVES:
        raise ValueError(
            f"inner_loop: derivative: expected one of {', '.join(map(repr, DERIVATIVES))}, "
            f"got {loop.derivative!r}."
        )
    if loop.window is not None:
        require_count(loop.window, "window")
    is_budget = isinstance(loop.keep, str) and in_bytes(loop.keep) is not None
    if isinstance(loop.keep, int):
        require_count(loop.keep, "keep")
    elif loop.keep not in ("all", "steps", "reversible") and not is_budget:
        raise (ValueError if isinstance(loop.keep, str) else TypeError)(
            'inner_loop: keep: expected "all", "steps", "reversible", a number of snapshots or '
            f'a budget such as "64MiB", got {loop.keep!r}.'
        )
    require_place(loop.keep_on, loop.keep, str(loop.derivative))
    require_tasks(loop.tasks)
    if isinstance(loop.blocks, str):
        raise TypeError(
            f"inner_loop: blocks: expected a sequence of names, got {loop.blocks!r}; pass "
            f"[{loop.blocks!r}]."
        )
    if loop.blocks and loop.derivative != "mixed":
        raise ValueError(
            'inner_loop: blocks: expected derivative="mixed", in which blocks are computed '
            f"again, got {loop.derivative!r}; leave blocks out."
        )
    if loop.execute not in EXECUTE:
        raise ValueError(
            f"inner_loop: execute: expected one of {', '.join(map(repr, EXECUTE))}, got "
            f"{loop.execute!r}."
        )
    _require_execute(loop, is_budget=is_budget)


def _require_execute(loop: Any, *, is_budget: bool) -> None:
    require_count(loop.unroll, "unroll")
    is_traced = loop.execute in TRACED
    ways = is_traced, loop.derivative == "reverse", loop.keep == "all"
    if loop.unroll > 1 and not (all(ways) and loop.window is None):
        raise ValueError(
            'inner_loop: unroll: expected execute="trace" or "compile", derivative="reverse", '
            f'keep="all" and no window for {loop.unroll} steps a program, got '
            f"execute={loop.execute!r}, derivative={loop.derivative!r}, keep={loop.keep!r}, "
            f"window={loop.window}."
        )
    if loop.keep == "reversible" and (is_traced or loop.derivative == "forward"):
        raise ValueError(
            'inner_loop: keep: expected a value other than "reversible" for execute='
            f"{loop.execute!r} and derivative={loop.derivative!r}: its steps use integers, which "
            'only an eager run can undo; use "reverse" or "mixed" and execute="eager".'
        )
    differences = isinstance(loop.derivative, Differences) or loop.derivative == "differences"
    if differences and loop.execute != "eager":
        raise ValueError(
            'inner_loop: execute: expected "eager" with derivative="differences", whose error '
            f"is checked in each backward pass, got {loop.execute!r}."
        )
    is_plain = loop.derivative == "mixed" and loop.tasks is None and not is_budget
    if loop.execute == "blocks" and not is_plain:
        raise ValueError(
            'inner_loop: execute: expected derivative="mixed", one task and no budget for '
            f'"blocks", got derivative={loop.derivative!r}, tasks={loop.tasks!r}, '
            f'keep={loop.keep!r}; use execute="eager".'
        )
