# SPDX-License-Identifier: Apache-2.0
"""The tables of several processes, from the stored results."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.tables import ratio_text, seconds_text, table


def machine_lines(result: dict[str, Any]) -> str:
    """Return a line about the machine and the versions of a result."""
    machine = result["machine"]
    if "rivals" in result:
        versions, date = result["rivals"]["torchopt"]["versions"], result["created"][:10]
    else:
        versions, date = result["versions"], result["date"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; torch "
        f"{versions['torch']}, torchopt {versions['torchopt']}; one thread a process, {date}, "
        f"load of the machine before {machine.get('load_before', 'unknown')}."
    )


def load_table(result: dict[str, Any]) -> str:
    """Return the times of steps, with torchopt and by hand."""
    rows = [
        [
            cell["row"],
            cell["rival"],
            *(seconds_text(cell[side]["median"]) for side in ("ours", "by_hand")),
            *(ratio_text(cell[f"ratio_of_{which}s"]) for which in ("median", "min")),
        ]
        for cell in result["cells"]
        if "by_hand" in cell
    ]
    head = ["two processes", "the other side", "TaskParallel", "the other", "ratio of medians"]
    whole = table([*head, "ratio of minima"], rows)
    for cell in result["cells"]:
        if "limit_seconds" in cell:
            median = seconds_text(cell["ours"]["median"])
            name = cell["row"][0].upper() + cell["row"][1:]
            whole = f"{whole.strip()}\n\n{name}, one from each rank, take {median}."
    return whole


def memory_table(result: dict[str, Any]) -> str:
    """Return the resident memory after parts of many steps."""
    rows = [
        [cell["row"], *(f"{x:.0f} MiB" for x in cell["mib"]), *[""] * (4 - len(cell["mib"]))]
        for cell in result["cells"]
        if "mib" in cell
    ]
    return table(["", "after a quarter", "a half", "all", "after the late calls"], rows)


def check_table(result: dict[str, Any]) -> str:
    """Return the model's figures and those of 1 to 4 processes."""
    rows = []
    for name, row in result["check"].items():
        sums = [row.get(f"{which}_sum_seconds") for which in ("measured", "predicted")]
        rows.append(
            [
                name,
                *(f"{row[f'{which}_speed_up']:.2f}" for which in ("measured", "predicted")),
                *("" if x is None else seconds_text(x) for x in sums),
            ]
        )
    head = ["backend and processes", "speed-up", "by the model", "a sum of the gradients"]
    text = table([*head, "by the model"], rows).strip()
    ranges = []
    for backend in dict.fromkeys(name.partition(" ")[0] for name in result["check"]):
        of_it = [row for name, row in result["check"].items() if name.startswith(backend)]
        times = [1.0 + row["relative_error"] for row in of_it]
        ranges.append(f"{min(times):.2f} to {max(times):.2f} with `{backend}`")
    return f"{text}\n\nThe model's speed-ups over those measured: {', '.join(ranges)}."


def prediction_table(result: dict[str, Any]) -> str:
    """Return the predictions for many workers."""
    found: dict[int, dict[tuple[str, int], Any]] = {}
    for backend, rows in result["predictions"].items():
        for row in rows:
            found.setdefault(row["workers"], {})[backend, row["tasks"]] = row
    columns = list(next(iter(found.values())))
    head = ["workers"]
    for backend, tasks in columns:
        head += [f"{backend}, {tasks} tasks", "most is lost to"]
    lines = []
    for workers, cells in found.items():
        line = [str(workers)]
        for column in columns:
            line += [f"{cells[column]['speed_up']:.1f}", cells[column]["limit"]]
        lines.append(line)
    return f"{table(head, lines).strip()}\n\n{result['assumptions']}"
