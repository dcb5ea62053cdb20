# SPDX-License-Identifier: Apache-2.0
"""Time optimizer steps on the CPU: torchopt's kernels against torch.optim and plain torch.

Run it from the root of the repository: python -m benchmarks.torchopt.cpu_kernels [--threads N]

All rivals run in one process, in turns, with the same malloc settings: freed memory is kept, so
that times do not depend on page faults. OpenMP threads sleep instead of spinning. Both settings are
read when a process starts, so this program restarts itself with them. Answers are checked before
anything is timed. It prints the least time of consecutive runs of each rival, and of its first run
after the other rivals used the caches; the JSON also has the medians.

Page faults are counted in a separate process, with the default malloc settings.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import load
from benchmarks.harness.process import KEEP_MEMORY
from benchmarks.harness.program import finish
from benchmarks.harness.results import RESULTS, new_result

LAYOUTS: dict[str, list[tuple[int, ...]]] = {
    "10 x 1M": [(1000, 1000)] * 10,
    "1000 x 1k": [(1000,)] * 1000,
    "MLP, 6 tensors": [(64, 32), (64,), (64, 64), (64,), (10, 64), (10,)],
}
TINY: dict[str, list[tuple[int, ...]]] = {"3 x 10": [(10,)] * 3}
ENVIRONMENT = {**KEEP_MEMORY, "OMP_WAIT_POLICY": "passive"}


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each table")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_kernels.json")
    parser.add_argument("--update", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--under-load", action="store_true", help="store it all the same")
    parser.add_argument("--faults", action="store_true", help="only count page faults, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="tiny tensors, nothing stored")
    return parser.parse_args(argv)


def measure(layouts: dict[str, list[tuple[int, ...]]], seconds: float) -> list[dict[str, Any]]:
    """Check, time and print; return one cell for each layout, case and rival."""
    import torch

    from benchmarks.torchopt import kernel_rivals as rivals

    cells: list[dict[str, Any]] = []

    def table(layout: str, case: str, runs: dict[str, Any], floor: int | None, size: int) -> None:
        times = rivals.take_turns(runs, seconds)
        base = next(iter(times))
        print(f"\n{case}, {layout}")
        for name, time in times.items():
            cell = {
                "layout": layout,
                "case": case,
                "rival": name,
                "clock": "perf_counter",
                "load": load(),
                "seconds": time.least,
                "median": time.median,
                "cold": time.cold,
                "cold_times_native": time.cold / times[base].cold,
                "times_native": time.least / times[base].least,
            }
            if floor is not None:
                cell["gigabytes_per_second"] = 1e-9 * floor * size / time.least
                triad = times.get("triad")
                if triad is not None:
                    fraction = floor * triad.least / (12 * time.least)
                    cell |= {"fraction_of_triad": fraction, "times_floor": 1 / fraction}
            if name != "triad":
                cells.append(cell)
            print(
                f"  {name:20s} {1e3 * time.least:10.4f} ms {cell['times_native']:8.2f} x {base}"
                f"; cold {1e3 * time.cold:10.4f} ms {cell['cold_times_native']:8.2f} x"
                + (
                    f"  {cell['fraction_of_triad']:6.2f} of triad"
                    if "fraction_of_triad" in cell and name != "triad"
                    else ""
                )
            )

    for layout, shapes in layouts.items():
        size = sum(torch.Size(s).numel() for s in shapes)
        a, b, c = (torch.zeros(size) for _ in range(3))
        triad = {"triad": lambda a=a, b=b, c=c: torch.add(a, b, alpha=2.0, out=c)}
        steps = rivals.in_place_rivals(shapes, "cpu")
        table(layout, "Adam in place", steps | triad, rivals.IN_PLACE_BYTES, size)
        params = rivals.make_parameters(shapes, "cpu")
        rivals.check_backends(params)
        runs = {str(b): rivals.functional(params, b) for b in rivals.BACKENDS}
        table(layout, "Adam functional", runs | triad, rivals.FUNCTIONAL_BYTES, size)
        runs = {str(b): rivals.differentiated_in_all(params, b) for b in rivals.BACKENDS}
        both = rivals.FUNCTIONAL_BYTES + rivals.BACKWARD_BYTES
        table(layout, "Adam forward and backward, by all", runs | triad, both, size)
        runs = {str(b): rivals.differentiated(params, b) for b in rivals.BACKENDS}
        both = rivals.FUNCTIONAL_BYTES + rivals.BACKWARD_OF_UPDATE_BYTES
        table(layout, "Adam forward and backward", runs | triad, both, size)
        counts = {str(b): rivals.count_operations(run) for b, run in runs.items()}
        saved = 1 - counts["native"] / counts["reference"]
        print(f"  operations: {counts}, {saved:.0%} fewer")
        cells.append({"layout": layout, "case": "operations", **counts, "fewer": saved})
    return cells


def faults_here(layouts: dict[str, list[tuple[int, ...]]]) -> list[dict[str, Any]]:
    """Count the page faults of functional steps whose states replace one another."""
    import resource
    import time

    import torch

    import torchopt
    from benchmarks.torchopt import kernel_rivals as rivals
    from torchopt.optimizers.native import with_backend

    cells = []
    for layout, shapes in layouts.items():
        params = [p.detach() for p in rivals.make_parameters(shapes, "cpu")]
        grads = [p.sin() for p in params]
        for backend in rivals.BACKENDS:
            t = with_backend(torchopt.adam(1e-3), backend)
            state = t.init(params)
            for _ in range(3):
                _, state = t.update(grads, state, inplace=False)
            steps = 5
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            for _ in range(steps):
                _, state = t.update(grads, state, inplace=False)
            seconds = (time.perf_counter() - start) / steps
            faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / steps
            pages = 12 * sum(torch.Size(s).numel() for s in shapes) / resource.getpagesize()
            cells.append(
                {
                    "layout": layout,
                    "case": "page faults",
                    "rival": str(backend),
                    "faults": faults,
                    "pages_written": pages,
                    "seconds": seconds,
                }
            )
    return cells


def page_faults(threads: int, tiny: bool) -> list[dict[str, Any]]:
    """Count page faults in a process without malloc settings; print and return the cells."""
    plain = {k: v for k, v in os.environ.items() if k not in KEEP_MEMORY}
    command = [sys.executable, "-m", "benchmarks.torchopt.cpu_kernels", "--faults"]
    command += ["--threads", str(threads)] + (["--dry-run"] if tiny else [])
    output = subprocess.run(command, env=plain, check=True, capture_output=True, text=True).stdout
    cells: list[dict[str, Any]] = json.loads(output.splitlines()[-1])
    print("\npage faults of a functional step, default malloc settings")
    for cell in cells:
        print(
            f"  {cell['layout']:16s} {cell['rival']:10s} {cell['faults']:10.1f} faults"
            f" ({cell['pages_written']:.0f} pages written) {1e3 * cell['seconds']:10.4f} ms"
        )
    return cells


def main(argv: list[str] | None = None) -> None:
    """Check, time, print and store."""
    arguments = arguments_of(argv)
    if arguments.faults:
        import torch

        torch.set_num_threads(arguments.threads)
        print(json.dumps(faults_here(TINY if arguments.dry_run else LAYOUTS)))
        return
    if argv is None and any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):
        command = [sys.executable, "-m", "benchmarks.torchopt.cpu_kernels", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **ENVIRONMENT})

    import torch

    torch.set_num_threads(arguments.threads)
    settings = {"threads": arguments.threads, "environment": ENVIRONMENT}
    versions = {"torch": torch.__version__, "torchopt": version("torchopt")}
    result = new_result("cpu_kernels", {"versions": versions}, settings)
    print("machine:", result["machine"])
    print(versions, settings)
    tiny = arguments.dry_run
    result["cells"] = measure(TINY if tiny else LAYOUTS, 0.0 if tiny else arguments.seconds)
    result["cells"] += page_faults(arguments.threads, tiny)
    if not tiny:
        finish(result, arguments)


if __name__ == "__main__":
    main()
