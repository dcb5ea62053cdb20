# SPDX-License-Identifier: Apache-2.0
"""Build, check and time the CUDA kernels with one command.

From the root of a checkout, on a machine with nvcc, torch and a device:

    python -m benchmarks.torchopt.gpu_kernels [--stages build check sanitize measure]

build     both packages with CUDA into build/gpu/site; nothing is downloaded. The build needs
          scikit-build-core and pybind11: installed, or as wheels in the folder `--wheels`; and the
          sources of Abseil that `python packages/optree/_build/vendor.py` puts in place.
check     the tests marked "cuda": the grid of rules, dtypes, shapes, layouts and steps against the
          CPU kernels and the plain statements, derivatives, gradcheck, streams, large tensors.
sanitize  the part of those tests named "sanitizer" under memcheck and racecheck of
          compute-sanitizer.
measure   Adam in place against torch.optim, fused and foreach; functional, and forward and
          backward, against plain torch: 1M, 100M and 1B parameters in 1, 1000 and 10000 tensors,
          with the fraction of the bandwidth of a copy that is timed in the same turns. Rewrites
          benchmarks/results/gpu_kernels.json after each layout. What does not fit into the
          memory of the device is reported and left out.

After a failed stage the next one still runs, except after a failed build; the exit status
is 0 only if all stages passed. `--dry-run` runs the stages that need no device, on the CPU and
with tiny tensors: it builds nothing, runs the CPU versions of the tests, and stores nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu"
SITE = FOLDER / "site"
STAGES = ("build", "check", "sanitize", "measure")
SIZES = {"1M": 10**6, "100M": 10**8, "1B": 10**9}
TENSORS = (1, 1000, 10000)
TESTS = "packages/torchopt/tests/kernels/test_devices.py"
ABSEIL = "packages/optree/third_party/abseil-cpp/absl"
BUILD_TOOLS = ("scikit_build_core", "pybind11")
GRAPH_LIMIT = 200_000_000  # parameters; the graph of plain torch keeps some 20 tensors for each


class StageError(Exception):
    """A stage failed."""


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--dry-run", action="store_true", help="no device, tiny tensors")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each table")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--wheels", type=Path, help="folder with wheels of the build tools")
    parser.add_argument("--architectures", default="native", help="as CMAKE_CUDA_ARCHITECTURES")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at once")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="its command")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu_kernels.json")
    return parser.parse_args(argv)


def environment(arguments: argparse.Namespace, **more: str) -> dict[str, str]:
    """Return the variables under which a stage imports what the first one built."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if SITE.is_dir() and not arguments.dry_run:
        paths.insert(0, str(SITE))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


def run(command: list[str], variables: dict[str, str], timeout: float = 3600.0) -> None:
    """Run a command from the root.

    Raises:
        StageError: It failed, could not be started or took too long.
    """
    print("+", " ".join(command), flush=True)
    try:
        subprocess.run(command, cwd=ROOT, env=variables, check=True, timeout=timeout)
    except (OSError, subprocess.SubprocessError) as error:
        raise StageError(str(error)) from error


def errors_in(log: Path) -> str:
    """Return the lines of a build's log that tell what went wrong."""
    if not log.is_file():
        return ""
    lines = log.read_text(errors="replace").splitlines()
    found = [x for x in lines if "error" in x.lower() or "FAILED" in x]
    return "\n".join([f"from {log}:", *found[:40]])


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build both packages with CUDA kernels, offline."""
    if arguments.dry_run:
        return {"skipped": "dry run: the packages that are installed are used"}
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ:
        raise StageError("expected nvcc on PATH or its path in CUDACXX, found neither")
    if not (ROOT / ABSEIL).is_dir():
        raise StageError(
            f"expected Abseil's sources in {ABSEIL}, found none; run "
            "`python packages/optree/_build/vendor.py` where there is a network, and bring them"
        )
    offline = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
    shutil.rmtree(FOLDER, ignore_errors=True)
    missing = [name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None]
    if missing:
        if arguments.wheels is None:
            raise StageError(
                f"expected {', '.join(missing)} to be installed or as wheels in --wheels DIR, "
                "found neither"
            )
        tools = [name.replace("_", "-") for name in BUILD_TOOLS]
        run([*offline, "--find-links", str(arguments.wheels), "--target", str(SITE), *tools,
             "ninja", "cmake"], dict(os.environ))  # fmt: skip
    variables = environment(
        arguments,
        TORCHOPT_CUDA="ON",
        CMAKE_BUILD_PARALLEL_LEVEL=str(arguments.jobs),
        CMAKE_ARGS=f"-DCMAKE_CUDA_ARCHITECTURES={arguments.architectures}",
        PATH=os.pathsep.join([str(SITE / "bin"), os.environ.get("PATH", "")]),
    )
    for package in ("optree", "torchopt"):
        # A build of torchopt that fails leaves the package without its extension, so the compiler's
        # messages are kept for the check below.
        log = FOLDER / f"{package}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            run([*offline, "--log", str(log), "--no-build-isolation", "--no-deps",
                 "--upgrade", "--target", str(SITE), f"packages/{package}"], variables)  # fmt: skip
        except StageError as error:
            raise StageError(f"{error}\n{errors_in(log)}") from error
    probe = "import torch, torchopt._C as c; print(int(c.WITH_CUDA), c.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", probe],
        env=environment(arguments), cwd=FOLDER, capture_output=True, text=True,
    )  # fmt: skip
    if not found.stdout.startswith("1 ") or str(SITE) not in found.stdout:
        raise StageError(
            f"expected kernels for CUDA in {SITE}, got {found.stdout!r} {found.stderr[-500:]!r}\n"
            f"{errors_in(FOLDER / 'torchopt.log')}"
        )
    return {"extension": found.stdout.split()[1]}


def counts_of(report: Path) -> dict[str, int]:
    """Return the counts of a JUnit report."""
    total = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for key in total:
            total[key] += int(suite.get(key, "0"))
    return total


def pytest(
    arguments: argparse.Namespace, prefix: list[str], select: str, **more: str
) -> dict[str, int]:
    """Run the tests whose names fit `select` for the device; return their counts.

    Raises:
        StageError: Tests failed, were skipped for want of a device, or there were none.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    report = FOLDER / "tests.xml"
    report.unlink(missing_ok=True)
    device = "cpu" if arguments.dry_run else "cuda"
    selection = f"{device} and {select}" if select else device
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    run([*prefix, *tests, "-k", selection, f"--junitxml={report}"], environment(arguments, **more))
    counts = counts_of(report)
    # Besides those that need two devices or much memory, tests are skipped for want of a device.
    if counts["tests"] - counts["skipped"] <= counts["skipped"]:
        raise StageError(f"expected tests to run on {device}, got {counts}")
    return counts


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the grid of tests."""
    return pytest(arguments, [], "")


def sanitize(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the tests for compute-sanitizer under its tools."""
    if arguments.dry_run:
        return {"without sanitizer": pytest(arguments, [], "sanitizer")}
    if shutil.which(arguments.sanitizer) is None:
        raise StageError(
            f"expected {arguments.sanitizer} on PATH (it is part of the CUDA toolkit), found none"
        )
    found: dict[str, Any] = {}
    for tool in ("memcheck", "racecheck"):
        prefix = [arguments.sanitizer, "--tool", tool, "--error-exitcode", "9",
                  "--target-processes", "all"]  # fmt: skip
        # Without torch's cache every tensor is an allocation of its own, with bounds of its own.
        found[tool] = pytest(arguments, prefix, "sanitizer", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return found


def layouts(arguments: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Return (label, elements of a tensor, tensors) for each size and number of tensors."""
    if arguments.dry_run:
        return [("1k in 1", 1000, 1), ("1k in 10", 100, 10)]
    return [
        (f"{label} in {count}", SIZES[label] // count, count)
        for label in arguments.sizes
        for count in TENSORS
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time in a process of its own, which imports what was built."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    stored = arguments.out or ROOT / "benchmarks" / "results" / "gpu_kernels.json"
    out = FOLDER / "dry_run.json" if arguments.dry_run else stored
    command = [sys.executable, "-m", "benchmarks.torchopt.gpu_kernels", "--out", str(out)]
    command += ["--seconds", "0" if arguments.dry_run else str(arguments.seconds)]
    command += ["--sizes", *arguments.sizes]
    if arguments.dry_run:
        command.append("--dry-run")
    run(command, environment(arguments, TORCHOPT_MEASURE="1"))
    return {"out": str(out)}


def measure_here(arguments: argparse.Namespace) -> None:
    """Check, time, print and store, in this process."""
    import torch

    from benchmarks.harness.results import new_result, write_result
    from benchmarks.torchopt import kernel_rivals as rivals

    device = "cpu" if arguments.dry_run else "cuda"
    synchronize = (lambda: None) if device == "cpu" else torch.cuda.synchronize
    versions: dict[str, Any] = {"torch": torch.__version__, "torchopt": version("torchopt")}
    if device == "cuda":
        versions["device"] = torch.cuda.get_device_name()
        versions["cuda"] = torch.version.cuda
    result = new_result("gpu_kernels", {"versions": versions}, {"seconds": arguments.seconds})
    print(json.dumps(versions), flush=True)

    # Twice the size of the last cache of any device, so that it is memory that is measured.
    source = torch.zeros(1000 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}

    def table(layout: str, case: str, make: Callable[[], dict[str, Any]], floor: int) -> None:
        size = elements * count
        try:
            runs = make()
            times = rivals.take_turns(runs | copy, arguments.seconds, synchronize)
        except torch.cuda.OutOfMemoryError as error:
            print(f"\n{case}, {layout}: left out, {str(error).splitlines()[0]}", flush=True)
            result["cells"].append({"layout": layout, "case": case, "left_out": "memory"})
            return
        bandwidth = 8 * source.numel() / times["copy"].least
        print(f"\n{case}, {layout}; copy {1e-9 * bandwidth:.0f} GB/s")
        for name in runs:
            time = times[name]
            cell = {
                "layout": layout,
                "case": case,
                "rival": name,
                "seconds": time.least,
                "median": time.median,
                "times_native": time.least / times[next(iter(runs))].least,
                "copy_gigabytes_per_second": 1e-9 * bandwidth,
                "fraction_of_copy": floor * size / time.least / bandwidth,
            }
            result["cells"].append(cell)
            print(
                f"  {name:18s} {1e3 * time.least:10.4f} ms {cell['times_native']:7.2f} x  "
                f"{cell['fraction_of_copy']:6.1%} of the bandwidth of a copy",
                flush=True,
            )

    def in_turns(make: Callable[[Any, Any], Any], params: Any) -> dict[str, Any]:
        return {str(b): make(params, b) for b in rivals.BACKENDS}

    def checked(params: Any) -> dict[str, Any]:
        rivals.check_backends(params)
        return in_turns(rivals.differentiated, params)

    for label, elements, count in layouts(arguments):
        shapes = [(elements,)] * count
        table(
            label,
            "Adam in place",
            lambda shapes=shapes: rivals.in_place_rivals(shapes, device),  # type: ignore[misc]
            rivals.IN_PLACE_BYTES,
        )
        if elements * count <= GRAPH_LIMIT:
            params = rivals.make_parameters(shapes, device)
            cases: list[tuple[str, Callable[[], dict[str, Any]], int]] = [
                (
                    "Adam functional",
                    functools.partial(in_turns, rivals.functional, params),
                    rivals.FUNCTIONAL_BYTES,
                ),
                (
                    "Adam forward and backward",
                    functools.partial(checked, params),
                    rivals.FUNCTIONAL_BYTES + rivals.BACKWARD_OF_UPDATE_BYTES,
                ),
                (
                    "Adam forward and backward, by all",
                    functools.partial(in_turns, rivals.differentiated_in_all, params),
                    rivals.FUNCTIONAL_BYTES + rivals.BACKWARD_BYTES,
                ),
            ]
            for case, make, floor in cases:
                table(label, case, make, floor)
            del params, cases, make
        if device == "cuda":
            torch.cuda.empty_cache()
        write_result(result, arguments.out)


def main(argv: list[str] | None = None) -> int:
    """Run the stages and return the exit status."""
    arguments = arguments_of(argv)
    if os.environ.get("TORCHOPT_MEASURE") == "1":
        measure_here(arguments)
        return 0
    functions = {"build": build, "check": check, "sanitize": sanitize, "measure": measure}
    failed = []
    for stage in STAGES:
        if stage not in arguments.stages:
            continue
        print(f"\n=== {stage}", flush=True)
        try:
            print(f"{stage}: ok {json.dumps(functions[stage](arguments))}", flush=True)
        except StageError as error:
            print(f"{stage}: FAILED {error}", flush=True)
            failed.append(stage)
            if stage == "build":
                break
    print(f"\n{'failed: ' + ', '.join(failed) if failed else 'all stages ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
