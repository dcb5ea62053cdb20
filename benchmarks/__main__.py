# SPDX-License-Identifier: Apache-2.0
"""Run suites one after the other on a quiet machine, then write the tables and plots.

python -m benchmarks                     # all, one hour and a half
python -m benchmarks torchopt implicit   # these
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.harness.machine import load
from benchmarks.harness.results import LOAD_LIMIT
from benchmarks.harness.rival import ROOT

SUITES = {
    "optree": "benchmarks.optree.run",
    "torchopt": "benchmarks.torchopt.run",
    "implicit": "benchmarks.torchopt.implicit",
    "zero_order": "benchmarks.torchopt.zero_order",
    "engines": "benchmarks.engines.run",
    "engines_explicit": "benchmarks.engines.explicit",
    "cpu_kernels": "benchmarks.torchopt.cpu_kernels",
    "distributed": "benchmarks.torchopt.distributed",
    "distributed_load": "benchmarks.torchopt.distributed_load",
    "meta_steps": "benchmarks.torchopt.meta_steps",
}
# How long to wait until the load of one suite no longer counts against the next one.
SECONDS_OF_REST = 180


def rest() -> None:
    """Wait until the machine is quiet enough, for `SECONDS_OF_REST` at most."""
    end = time.monotonic() + SECONDS_OF_REST
    while load() > 0.8 * LOAD_LIMIT and time.monotonic() < end:
        time.sleep(5)


def main(arguments: list[str]) -> int:
    """Return how many suites failed or were refused."""
    chosen = [a for a in arguments if not a.startswith("-")] or list(SUITES)
    unknown = set(chosen) - set(SUITES)
    if unknown:
        sys.stderr.write(f"expected suites among {', '.join(SUITES)}; got {', '.join(unknown)}\n")
        return 2
    options = [a for a in arguments if a.startswith("-")]
    if load() > LOAD_LIMIT / 2 and "--under-load" not in options:
        sys.stderr.write(f"expected a quiet machine, got a load of {load()}\n")
        return 1
    failed = 0
    for name in chosen:
        rest()
        command = [sys.executable, "-m", SUITES[name], *options]
        failed += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    failed += subprocess.run([sys.executable, "tools/bench_report.py"], cwd=ROOT).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
