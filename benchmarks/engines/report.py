# SPDX-License-Identifier: Apache-2.0
"""The table of engines."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.tables import seconds_text, spread_text, table

Result = dict[str, Any]


def machine_lines(result: Result) -> str:
    """Return on what the result was measured."""
    machine, problem = result["machine"], result["problem"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    what = "median of seven and how far the least is below it"
    if "median" not in result["rows"][0]:
        what = "minimum of seven"
    return (
        f"{problem['size']} unknowns, {problem['steps']} inner steps, float64.\n"
        f"{machine['processor']}, one thread, {machine['system']}; {versions}; {what}, "
        f"{result['created'][:10]}."
    )


def comparison_table(result: Result) -> str:
    """Return time, memory and error of each engine."""
    rows = [
        [
            row["engine"],
            spread_text(row["median"], row["seconds"])
            if "median" in row
            else seconds_text(row["seconds"]),
            f"{row['kept_bytes'] / 1024:.0f} KiB",
            f"{row['error']:.0e}" if row["error"] < 0.01 else f"{row['error']:.2f}",
            f"{row['cosine']:.3f}",
        ]
        for row in result["rows"]
    ]
    head = ["engine", "time", "kept for backward", "relative error", "cosine with the exact one"]
    return table(head, rows)
