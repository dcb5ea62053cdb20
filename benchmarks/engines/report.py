# SPDX-License-Identifier: Apache-2.0
"""The tables of engines and solvers."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.tables import NOTHING, seconds_text, spread_text, table

Result = dict[str, Any]


def machine_lines(result: Result) -> str:
    """Return a line about the machine and the versions of the result."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    rounds = "five" if result["suite"] == "engines_explicit" else "seven"
    what = f"processor time, median of {rounds}, and how far the minimum is below it"
    return (
        f"{machine['processor']}, one thread, float64, {machine['system']}; {versions}; {what}, "
        f"{result['created'][:10]}."
    )


def transformer_table(result: Result) -> str:
    """Return peak bytes and time of the explicit engine, and their ratios to the unrolled loop."""
    rows: list[list[str]] = []
    first: Result = {}
    for r in result.get("rows", []):
        first = r if r["engine"].startswith("unrolled") else first
        steps = "1 step" if r["steps"] == 1 else f"{r['steps']} steps"
        size = f"{r['blocks']} blocks, {steps}, {r['tokens']:,} tokens"
        ratio = f"1/{first['peak'] / r['peak']:.1f}"
        rows.append(
            [
                size if r is first else "",
                r["engine"],
                f"{r['peak'] / 2**20:.0f} MiB",
                NOTHING if r is first else ratio,
                _time(r),
                NOTHING if r is first else f"{r['median'] / first['median']:.2f}",
            ]
        )
    head = ["model", "kept", "peak", "of the unrolled loop", "time", "of the unrolled loop"]
    return table(head, rows)


def levels_table(result: Result) -> str:
    """Return the time and error of three levels for pairs of engines."""
    rows = [[r["engines"], _time(r), f"{r['error']:.0e}"] for r in result.get("levels", [])]
    return _table(["lower level in middle level", "time", "relative error"], rows)


def learned_table(result: Result) -> str:
    """Return time and error of the gradient in the weights of a learned optimizer."""
    rows = [
        [r["engine"], _time(r), _error(r["error"]), f"{r['cosine']:.3f}"]
        for r in result.get("learned", [])
        if "engine" in r
    ]
    return _table(["engine", "time", "relative error", "cosine"], rows)


def learned_steps_table(result: Result) -> str:
    """Return the cost of a step of learned optimizers."""
    rows = [
        [r["step"], _time(r), f"{r['state']:.0f}"] for r in result.get("learned", []) if "step" in r
    ]
    return _table(["2,410 parameters", "time", "state, numbers a parameter"], rows)


def solvers_table(result: Result) -> str:
    """Return iterations, time and error of linear solvers on the curvature of a network."""
    rows = [
        [
            r["solver"],
            r["preconditioner"],
            f"{r['iterations']}",
            seconds_text(r["setup"]),
            _time(r),
            _error(r["error"]),
        ]
        for r in result.get("solvers", [])
    ]
    head = ["solver", "preconditioner", "iterations", "made in", "solved in", "relative error"]
    return _table(head, rows)


def least_squares_table(result: Result) -> str:
    """Return steps, time and errors of nonlinear least squares."""
    rows = [
        [
            r["problem"],
            r["method"],
            f"{r['steps']}",
            _time(r),
            _error(r["error"]),
            _error(r.get("derivative_error")),
        ]
        for r in result.get("least_squares", [])
    ]
    head = ["problem", "method", "steps", "time", "error", "error of the derivative"]
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return table(head, rows) if rows else "Not measured yet: `python -m benchmarks.engines.run`."


def _time(row: Result) -> str:
    return spread_text(row["median"], row["seconds"])


def _error(error: float | None) -> str:
    if error is None:
        return NOTHING
    return f"{error:.0e}" if error < 0.01 else f"{error:.2f}"


def comparison_table(result: Result) -> str:
    """Return time, memory and error of each engine."""
    rows = [
        [
            row["engine"],
            _time(row),
            f"{row['kept_bytes'] / 1024:.0f} KiB",
            _error(row["error"]),
            f"{row['cosine']:.3f}",
        ]
        for row in result["rows"]
    ]
    head = ["engine", "time", "kept for backward", "relative error", "cosine with the exact one"]
    return table(head, rows)
