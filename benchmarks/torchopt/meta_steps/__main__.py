# SPDX-License-Identifier: Apache-2.0
"""Meta-steps of torchopt, eager and compiled, against jitted jax + optax; answers are compared.

    python -m benchmarks.torchopt.meta_steps --threads 1     # eight minutes on two quiet cores

Each library runs in a process of its own, for each number of threads; jax and optax are installed
in a folder of their own at first use. The compiler's cache is empty at first; a second process
uses the cache that the first one filled. Results go to
`benchmarks/results/torchopt_meta_steps.json`, the table to the terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.program import add_options, finish
from benchmarks.harness.results import new_result
from benchmarks.harness.rival import Rival, RivalError, prepare
from benchmarks.torchopt.meta_steps.rows import ROWS

ROOT = Path(__file__).resolve().parents[3]
JAX = Rival(
    "jax",
    "jax + optax",
    "benchmarks.torchopt.meta_steps.in_jax",
    ("jax==0.10.2", "jaxlib==0.10.2", "optax==0.2.8"),
)
# Relative to the largest entry. All ways run one program in single precision with sums in another
# order, which is an error of 1e-7 in each of up to 500 steps; stored results agree to 1.3e-5.
AGREE = 1e-3


def ask(
    paths: Sequence[Path], module: str, ways: str, folder: Path, threads: int, options: Any
) -> list[dict[str, Any]]:
    """Return the results of one side for its rows, with these folders of packages."""
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *paths])),
        "OMP_NUM_THREADS": str(threads),
        "XLA_FLAGS": one if threads == 1 else "",
        "JAX_PLATFORMS": "cpu",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
    }
    seconds = 0 if ways == "again" else 0.2 if options.quick else options.seconds
    command = [sys.executable, "-m", f"benchmarks.torchopt.meta_steps.{module}", str(folder)]
    command += [str(seconds), str(options.most), ways, *options.rows]
    if threads > 1:
        # Threads that sleep between loops wake up too late; by default they wait for the next one.
        environment.pop("OMP_WAIT_POLICY", None)
    # The compiler, and with it the first call, uses all cores; steps use this number of threads.
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def differences(folder: Path, row: str) -> dict[str, float]:
    """Return by way how far the meta-gradients are from those of jax, or from the eager ones.

    The eager ones are the reference without jax, and have no entry then.
    """
    answers = {}
    for way in ("jit", "eager", "compile", "again"):
        if (file := folder / f"{row}-{way}.npz").exists():
            found = np.load(file)
            answers[way] = [found[k] for k in found.files]
    if not answers:
        return {}
    reference, *others = answers
    return {way: _apart(answers[way], answers[reference]) for way in others}


def _apart(ours: list[Any], theirs: list[Any]) -> float:
    """Return the largest difference of two gradients, relative to the largest entry of each."""
    found = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]
    return float(np.nan_to_num(np.max(found), nan=np.inf))  # max() may drop a NaN


def main() -> int:
    """Measure and print; return 1 if answers differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each time")
    parser.add_argument("--most", type=int, default=90, help="seconds for a row")
    parser.add_argument("--no-store", action="store_true", help="print only")
    add_options(parser, "torchopt_meta_steps")
    options = parser.parse_args()
    try:
        jax = prepare(JAX, print).paths
    except RivalError as error:
        print(f"without jax: {error}")
        jax = None
    versions = {name: version(name) for name in ("torchopt", "torch")}
    versions |= dict(x.split("==") for x in JAX.requirements) if jax is not None else {}
    # The compiler has two threads in the rows of one too.
    threads = max(2, *options.threads)
    settings = {"seconds": options.seconds, "versions": versions, "threads": threads}
    result = new_result("torchopt_meta_steps", {}, settings)
    head = ("row", "threads", "eager", "compiled", "jax", "/ jax", "first call", "again", "of jax")
    print("{:15}{:>8}{:>10}{:>10}{:>10}{:>8}{:>12}{:>10}{:>10}{:>10}".format(*head, "differ"))
    wrong = False
    for threads in options.threads:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cells = ask((), "in_torch", "eager,compile", folder, threads, options)
            done = {
                cell["row"] for cell in cells if cell["way"] == "compile" and "error" not in cell
            }
            compiled = argparse.Namespace(**vars(options) | {"rows": sorted(done)})
            cells += ask((), "in_torch", "again", folder, threads, compiled)
            if jax is not None:
                cells += ask(jax, "in_jax", "jit", folder, threads, options)
            for row in options.rows:
                found = differences(folder, row)
                wrong |= any(differ > AGREE for differ in found.values())
                for cell in cells:
                    if cell["row"] == row and cell["way"] in found:
                        cell["differ"] = found[cell["way"]]
                print(_line(row, threads, cells, max(found.values(), default=None)), flush=True)
        result["cells"] += [{"threads": threads, **cell} for cell in cells]
    return int(wrong) if options.no_store else finish(result, options) or int(wrong)


def _line(row: str, threads: int, cells: list[dict[str, Any]], differ: float | None) -> str:
    found = {cell["way"]: cell for cell in cells if cell["row"] == row}
    none = float("nan")
    ms = {way: found.get(way, {}).get("median_ms", none) for way in ("eager", "compile", "jit")}
    first = [found.get(way, {}).get("first_s", none) for way in ("compile", "again", "jit")]
    errors = "; ".join(cell["error"] for cell in found.values() if "error" in cell)
    return (
        f"{row:15}{threads:8}{ms['eager']:10.2f}{ms['compile']:10.2f}{ms['jit']:10.2f}"
        f"{ms['compile'] / ms['jit']:8.2f}{first[0]:10.1f} s{first[1]:8.1f} s{first[2]:8.1f} s"
        f"{'' if differ is None else f'{differ:10.1e}'} {errors}"
    )


if __name__ == "__main__":
    sys.exit(main())
