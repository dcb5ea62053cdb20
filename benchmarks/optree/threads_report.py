# SPDX-License-Identifier: Apache-2.0
"""The table of two threads without the interpreter lock."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.tables import ratio_text, seconds_text, table


def machine_lines(result: dict[str, Any]) -> str:
    """Return a line about the machine and the versions of a result."""
    machine, settings = result["machine"], result["settings"]
    lock = "with" if settings["lock"] else "without"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; "
        f"Python {settings['python']} {lock} the interpreter lock; optree {settings['optree']}; "
        f"minimum of {settings['rounds']} rounds, {result['created'][:10]}, "
        f"load of the machine before {machine.get('load_before', 'unknown')}."
    )


def scaling_table(result: dict[str, Any]) -> str:
    """Return the time of one thread, and the throughput and cost of two threads."""
    rows = [
        [
            *(cell["tree"], cell["operation"], seconds_text(cell["min"])),
            *(ratio_text(cell[which]["throughput"]) for which in ("own", "shared")),
            *(ratio_text(cell[which]["cost"]) for which in ("own", "shared")),
        ]
        for cell in result["cells"]
    ]
    head = ["tree", "operation", "one thread", "two threads, own trees", "two, one tree"]
    return table([*head, "cost of a call, own trees", "cost, one tree"], rows)
