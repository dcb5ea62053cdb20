# SPDX-License-Identifier: Apache-2.0
"""Count the instructions of a fixed set of operations: a check that noise does not affect.

    python -m benchmarks.optree.instructions            # count and print
    python -m benchmarks.optree.instructions --check    # fail if a count rose by over 3 %
    python -m benchmarks.optree.instructions --update   # store the counts

Callgrind counts only while N operations run, so neither the start of Python nor the construction of
trees is counted (`instructions_target.py`). Copies of memory avoid the instruction `rep movsb` of
x86, which callgrind counts byte by byte. Counts depend on the interpreter's build and on the
compiler, so they are stored under the names of both. A check in an environment without stored
counts fails with a message.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.rival import ROOT, Place, RivalError, prepare
from benchmarks.harness.tables import table
from benchmarks.optree.operations import LABELS
from benchmarks.optree.run import add_ours_options, ours_and_rivals
from benchmarks.optree.trees import tree_label

STORE = Path(__file__).with_name("instructions.json")
MARGIN = 0.03

# (tree, operation): N
CASES: dict[tuple[str, str], int] = {
    ("leaf", "flatten"): 2000,
    ("tuple3", "flatten"): 2000,
    ("dict3", "flatten"): 2000,
    ("dict3", "unflatten"): 2000,
    ("dict3", "map_c"): 2000,
    ("dict3", "one_level"): 2000,
    ("resnet50", "flatten"): 50,
    ("resnet50", "unflatten"): 50,
    ("resnet50", "map_c"): 50,
    ("resnet50", "one_level"): 2000,
    ("resnet50", "paths"): 50,
    ("resnet50_dicts", "flatten"): 50,
    ("resnet50_dicts", "unflatten"): 50,
    ("state_nested", "flatten"): 50,
    ("state_nested", "unflatten"): 50,
    ("state_flat", "flatten"): 100,
    ("state_flat", "map_two"): 50,
    ("state_flat", "with_path"): 30,
    ("state_flat", "with_accessor"): 5,
    ("state_flat", "flatten_up_to"): 100,
    ("state_flat", "iterate"): 50,
    ("state_flat", "spec_equal"): 500,
    ("state_flat", "spec_hash"): 200,
    ("state_flat", "pickle_dump"): 20,
    ("state_flat", "pickle_load"): 20,
    ("list10k", "flatten"): 20,
    ("namedtuples", "flatten"): 20,
    ("namedtuples", "unflatten"): 20,
    ("deep500", "flatten"): 50,
    ("custom1000", "custom_flatten"): 10,
    ("dataclass1000", "custom_flatten"): 10,
    ("dataclass1000", "custom_unflatten"): 10,
}


# glibc on x86; other C libraries ignore the variable.
TUNABLES = ":".join(f"glibc.cpu.x86_rep_{copy}_threshold=1000000000" for copy in ("movsb", "stosb"))


class CountError(Exception):
    """Callgrind or the operation under it failed; the text says how."""


def environment_name(place: Place) -> str:
    """Return the name under which counts are stored: interpreter, machine, C library."""
    question = "import platform,sys;print(platform.python_version(), platform.python_compiler())"
    answer = subprocess.run(
        [place.python, "-S", "-c", question], capture_output=True, text=True, check=True
    ).stdout.strip()
    libc = " ".join(part for part in platform.libc_ver() if part)
    return f"CPython {answer}, {platform.machine()}, {libc}"


def count(place: Place, module: str, cases: dict[tuple[str, str], int]) -> dict[str, int]:
    """Return the instructions of one operation for each case, by ``tree:operation``.

    Args:
        place: the place of our optree.
        module: the rival module to run.
        cases: how often to run each pair of a tree and an operation of the tables.

    Raises:
        CountError: callgrind, or an operation, ended with an error.
    """
    flags = ["-S"] if place.isolated else []
    asked = [f"{tree}:{operation}:{number}" for (tree, operation), number in cases.items()]
    target = ["-m", "benchmarks.optree.instructions_target", module, *asked]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    variables["PYTHONHASHSEED"] = "0"
    variables["PYTHONPATH"] = os.pathsep.join([*map(str, place.paths), str(ROOT)])
    variables["GLIBC_TUNABLES"] = TUNABLES
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=callgrind", "--toggle-collect=ffi_call"),
            *(f"--callgrind-out-file={folder}/out.%p", f"--log-file={folder}/log.%p"),
            *(place.python, "-s", *flags, *target),
        ]
        # First without callgrind: compiling modules would move the objects in memory.
        for words in (command[-len(target) - 2 - len(flags) :], command):
            done = subprocess.run(
                words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
            )
        if done.returncode != 0:
            raise CountError(f"under callgrind: {done.stderr[-800:]}")
        processes = dict(line.split() for line in done.stdout.splitlines())
        return {
            f"{tree}:{operation}": _collected(
                Path(folder, f"log.{processes[f'{tree}:{operation}:{number}']}")
            )
            // number
            for (tree, operation), number in cases.items()
        }


def _collected(log: Path) -> int:
    text = log.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"Collected : (\d+)", text)
    if found is None or found[1] == "0":
        raise CountError(f"expected a count from callgrind, got: {text[-800:]}")
    return int(found[1])


def main(arguments: list[str] | None = None) -> int:
    """Count, then print, check or store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with the stored counts")
    action.add_argument("--update", action="store_true", help="store the counts")
    parser.add_argument("--filter", default="", metavar="TEXT", help="text in tree:operation")
    add_ours_options(parser)
    options = parser.parse_args(arguments)
    if shutil.which("valgrind") is None:
        sys.stderr.write("expected valgrind on PATH, found none; install it to count\n")
        return 2
    ours = ours_and_rivals(options)[0]
    try:
        place = prepare(ours)
        name = environment_name(place)
        chosen = {case: n for case, n in CASES.items() if options.filter in ":".join(case)}
        counts = count(place, ours.module, chosen)
    except (RivalError, CountError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    stored = json.loads(STORE.read_text(encoding="utf-8")) if STORE.is_file() else {}
    print(counts_table(counts, stored.get(name, {})))
    if options.update:
        stored[name] = {**stored.get(name, {}), **counts}
        text = json.dumps(stored, indent=1, sort_keys=True) + "\n"
        STORE.write_text(text, encoding="utf-8")
        print(f"stored for {name} in {STORE}")
        return 0
    return _check(counts, stored, name) if options.check else 0


def counts_table(counts: dict[str, int], stored: dict[str, int]) -> str:
    """Return the counts and the stored ones side by side."""
    rows = []
    for key, value in counts.items():
        tree, operation = key.split(":")
        before = stored.get(key)
        change = f"{value / before - 1:+.1%}" if before else "new"
        rows.append([tree_label(tree), LABELS[operation], f"{value:,}", change])
    return table(["tree", "operation", "instructions", "against the stored"], rows)


def _check(counts: dict[str, int], stored: dict[str, Any], name: str) -> int:
    if name not in stored:
        sys.stderr.write(
            f"expected stored counts for {name}, found those of {', '.join(stored) or 'none'}; "
            "run with --update on a revision known to be good\n"
        )
        return 2
    known: dict[str, int] = stored[name]
    worse = [
        f"{key}: {known[key]:,} -> {value:,} ({value / known[key] - 1:+.1%})"
        for key, value in counts.items()
        if key in known and value > known[key] * (1 + MARGIN)
    ]
    worse += [f"{key}: no stored count; run with --update" for key in counts if key not in known]
    if worse:
        sys.stderr.write(
            "\n".join([f"Instruction counts rose by more than {MARGIN:.0%}:", *worse, ""])
        )
        return 1
    print(f"{len(counts)} counts within {MARGIN:.0%} of the stored ones")
    return 0


if __name__ == "__main__":
    sys.exit(main())
