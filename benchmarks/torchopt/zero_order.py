# SPDX-License-Identifier: Apache-2.0
"""Time zero-order gradients: evaluations a second, error against evaluations, memory.

    python benchmarks/torchopt/zero_order.py                  # everything, some minutes
    python benchmarks/torchopt/zero_order.py --quick          # fewer and shorter rounds
    python benchmarks/torchopt/zero_order.py --group speed    # speed, error, memory

Each library runs in a process of its own, on one thread, and the clock is the processor time of
the process. A rival's estimate is compared with the exact gradient before it is timed: a wrong
factor or a missing baseline is an error, not a figure. Results go to
`benchmarks/results/torchopt_zero_order.json`, the tables to the terminal.

This module is also what runs in the rivals' processes (the functions that take a rival).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness.case import Prepared, UnsupportedError
from benchmarks.harness.process import CaseError, RivalProcess
from benchmarks.harness.results import RESULTS, Figures, new_result, write_result
from benchmarks.harness.rival import Rival, RivalError
from benchmarks.harness.tables import NOTHING, bytes_text, ratio_text, seconds_text, table
from benchmarks.harness.tournament import Cell, Effort, Tournament

SUITE = "benchmarks.torchopt.zero_order"
OURS = "torchopt"
GROUPS = ("speed", "error", "memory")
RESULT = "torchopt_zero_order"

FULL = Effort(rounds=5, seconds=0.5, sample_seconds=0.3, slow_seconds=20.0)
QUICK = Effort(rounds=2, seconds=0.1, sample_seconds=0.05, slow_seconds=4.0)


@dataclass(frozen=True)
class Case:
    """A network and how often it is evaluated.

    Attributes:
        sizes: Units of the layers.
        batch: Rows of the input.
        samples: Antithetic pairs.
        sigma: Size of the perturbation.
    """

    sizes: tuple[int, ...]
    batch: int
    samples: int = 1000
    sigma: float = 0.02


CASES = {
    "policy 4-32-32-2, batch 32": Case((4, 32, 32, 2), 32),
    "digits 64-32-10, batch 32": Case((64, 32, 10), 32),
    "digits 64-64-10, batch 64": Case((64, 64, 10), 64),
    "64-256-256-10, batch 64": Case((64, 256, 256, 10), 64),
}
MEMORY = Case((64, 128, 128, 10), 16)
MEMORY_SAMPLES = (50, 500, 5000)

METHODS = (
    *("naive", "forward", "antithetic", "leave_one_out", "orthogonal antithetic"),
    *("Sobol antithetic", "signs antithetic", "four points"),
)
SAMPLES = (16, 64, 256, 1024)
REPETITIONS = 20


def rivals() -> list[Rival]:
    """Return the competitors, ours first."""
    here, torch = "benchmarks.torchopt.zero_order_rivals", ("torch==2.13.0",)
    published = ("torchopt==0.7.3", "optree==0.20.0")
    return [
        Rival(OURS, "torchopt", f"{here}.ours"),
        Rival("low rank", "torchopt, rank 1", f"{here}.low_rank"),
        Rival("torchopt-0.7.3", "torchopt 0.7.3", f"{here}.decorated", published, torch, False),
        Rival("vmap", "vmap by hand", f"{here}.hand_vmap"),
        Rival("evosax", "evosax on jax", f"{here}.evosax_jax", ("evosax==0.3.2", "jax==0.10.2")),
    ]


# ------------------------------------------------------------------- in a rival's process


def describe(rival: Any) -> dict[str, Any]:
    """Return the versions of the distributions a rival runs on and where it is."""
    versions = {name: importlib.metadata.version(name) for name in rival.DISTRIBUTIONS}
    return {"versions": versions, "file": str(Path(rival.library.__file__).resolve())}


def arrays(case: Case) -> tuple[list[Any], Any, Any]:
    """Return weights, inputs and targets as float32 NumPy arrays, the same in every process."""
    import numpy

    draw = numpy.random.default_rng(0)
    weights: list[Any] = []
    for m, n in zip(case.sizes, case.sizes[1:]):
        weights += [draw.standard_normal((n, m)) / m**0.5, 0.1 * draw.standard_normal(n)]
    x = draw.standard_normal((case.batch, case.sizes[0]))
    y = draw.standard_normal((case.batch, case.sizes[-1]))
    return [w.astype("float32") for w in weights], x.astype("float32"), y.astype("float32")


def exact_gradient(weights: list[Any], x: Any, y: Any) -> Any:
    """Return the gradient of the mean squared error, by hand in float64."""
    import numpy

    weights = [w.astype("float64") for w in weights]
    inputs, layers = [x.astype("float64")], len(weights) // 2
    for k in range(layers):
        z = inputs[-1] @ weights[2 * k].T + weights[2 * k + 1]
        inputs.append(numpy.tanh(z) if k + 1 < layers else z)
    delta = 2 * (inputs[-1] - y) / y.size
    parts: list[Any] = []
    for k in reversed(range(layers)):
        parts = [(delta.T @ inputs[k]).ravel(), delta.sum(0), *parts]
        if k:
            delta = (delta @ weights[2 * k]) * (1 - inputs[k] ** 2)
    return numpy.concatenate(parts)


def check(run: Any, case: Case, exact: Any) -> None:
    """Compare an estimate with the gradient: <estimate, g> / <g, g> is 1 up to its error.

    For a linear loss the variance of that ratio is 2 / N (dense Gaussian directions) or up to four
    times as much (rank 1); smoothing changes it by O(sigma^2).
    """
    ratio = statistics.fmean(float(run() @ exact) / float(exact @ exact) for _ in range(4))
    if abs(ratio - 1) > 4 * (8 / (4 * case.samples)) ** 0.5 + 0.05:
        raise ArithmeticError(f"the estimate along the gradient is {ratio:.3f} of it")


def prepare(rival: Any, case: dict[str, Any]) -> Prepared:
    """Return the statement of a case, once its answer was found to be right."""
    chosen = Case(**case["case"])
    weights, x, y = arrays(chosen)
    run = rival.estimator(chosen, weights, x, y)
    check(run, chosen, exact_gradient(weights, x, y))
    return Prepared("run()", {"run": run}, clock=time.process_time)


def toys() -> dict[str, Any]:
    """Return functions of a vector of 24 numbers, and points, by name."""
    import torch

    draw = torch.Generator().manual_seed(0)
    a = torch.randn(24, generator=draw, dtype=torch.float64)
    start = torch.randn(24, generator=draw, dtype=torch.float64)
    scales = torch.logspace(0, 2, 24, dtype=torch.float64)

    def rosenbrock(x: Any) -> Any:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    return {
        "linear, offset 10": (lambda x: a @ x + 10.0, start),
        "ellipsoid": (lambda x: 0.5 * (scales * x * x).sum(), start),
        "Rosenbrock": (rosenbrock, 0.3 * start),
    }


def error(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the relative error of estimates, root mean square over repetitions."""
    if not hasattr(rival, "toy"):
        raise UnsupportedError("no such operation")
    import torch

    fn, point = toys()[case["tree"]]
    x = point.clone().requires_grad_()
    (exact,) = torch.autograd.grad(fn(x), x)
    squares, evaluations = [], 0
    for seed in range(case["repetitions"]):
        arguments = (case["operation"], case["samples"], case["sigma"], seed)
        got, evaluations = rival.toy(fn, point, *arguments)
        squares.append(float((got - exact).square().sum() / exact.square().sum()))
    return {"error": statistics.fmean(squares) ** 0.5, "evaluations": evaluations}


def peak(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return by how much one estimate raises the process's resident memory."""
    from benchmarks.optree.suite import _status_bytes

    chosen = Case(**case["case"])
    small = Case(chosen.sizes, chosen.batch, 2, chosen.sigma)
    arguments = arrays(chosen)
    rival.estimator(small, *arguments)()  # imports and compiles what is not counted
    run = rival.estimator(chosen, *arguments)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
        before = _status_bytes("VmRSS")
        run()
        return {"peak_bytes": _status_bytes("VmHWM") - before}
    except OSError as problem:
        raise UnsupportedError("the peak is read from /proc, which is Linux's") from problem


# ---------------------------------------------------------------------------- the program


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--group", action="append", choices=GROUPS, help="may be repeated")
    parser.add_argument("--filter", default="", metavar="TEXT", help="text in the name of a case")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{RESULT}.json", metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen groups, write the JSON and print the tables."""
    options = parse(arguments)
    groups = options.group or GROUPS
    effort = QUICK if options.quick else FULL
    with Tournament(rivals(), SUITE, report=say) as tournament:
        settings = {**asdict(effort), "repetitions": REPETITIONS, "threads": 1}
        result = new_result("torchopt zero order", tournament.rivals, settings)
        names = [name for name in CASES if options.filter in name and "speed" in groups]
        for name in names:
            say(f"speed: {name}")
            case = {"tree": name, "operation": "speed", "case": asdict(CASES[name])}
            result["cells"] += tournament.play(case, effort)
        if "error" in groups:
            result["cells"] += _errors(tournament, options)
    if "memory" in groups:
        result["cells"] += _memory(options.quick)
    write_result(result, options.output)
    for group in groups:
        print(f"\n{TABLES[group](result)}")
    print(f"\nwritten to {options.output}")
    return 0


def _errors(tournament: Tournament, options: argparse.Namespace) -> list[Cell]:
    cells: list[Cell] = []
    names = ("linear, offset 10", "ellipsoid", "Rosenbrock")
    for process in tournament.processes:
        say(f"error: {process.rival.label}")
        for name in (name for name in names if options.filter in name):
            for method in METHODS:
                for samples in SAMPLES:
                    case = {"tree": name, "operation": method, "samples": samples, "sigma": 0.1}
                    case["repetitions"] = 4 if options.quick else REPETITIONS
                    cells.append(_asked(process, "error", case))
    return [cell for cell in cells if cell["status"] != "unsupported"]


def _memory(quick: bool) -> list[Cell]:
    cells: list[Cell] = []
    for rival in rivals():
        say(f"memory: {rival.label}")
        for samples in MEMORY_SAMPLES[:2] if quick else MEMORY_SAMPLES:
            chosen = Case(MEMORY.sizes, MEMORY.batch, samples, MEMORY.sigma)
            case = {"tree": "memory", "operation": "memory", "samples": samples}
            case["case"] = asdict(chosen)
            try:
                process = RivalProcess.start(rival, SUITE, environment={})
            except RivalError as problem:
                cells.append({**case, "rival": rival.name, "status": "missing"})
                cells[-1]["reason"] = str(problem)
                continue
            cells.append(_asked(process, "peak", case))
            process.stop()
    return cells


def _asked(process: RivalProcess, function: str, case: dict[str, Any]) -> Cell:
    cell: Cell = {**case, "rival": process.rival.name, "gc": False}
    try:
        cell.update(process.ask("call", name=function, case=case), status="ok")
    except CaseError as problem:
        cell.update(status=problem.kind, reason=str(problem))
    return cell


def speed_table(result: dict[str, Any]) -> str:
    """Return our evaluations a second and every rival's time as a multiple of ours."""
    figures = Figures(result)
    names = {name: str(entry["label"]) for name, entry in result["rivals"].items()}
    others = [name for name in names if name != OURS]
    rows = []
    for name, case in CASES.items():
        own = figures.seconds(name, "speed", OURS)
        if own is None:
            continue
        row = [name, f"{2 * case.samples / own:,.0f}", seconds_text(own)]
        ratios = [figures.ratio(name, "speed", other, OURS) for other in others]
        rows.append([*row, *map(ratio_text, ratios)])
    head = ["network, 1000 pairs", "evaluations/s", "torchopt", *(names[o] for o in others)]
    return table(head, rows)


def error_table(result: dict[str, Any]) -> str:
    """Return the relative error of each method against its number of evaluations."""
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for cell in result["cells"]:
        if cell["operation"] in METHODS:
            key = (cell["tree"], cell["operation"], result["rivals"][cell["rival"]]["label"])
            text = NOTHING
            if cell["status"] == "ok":
                text = f"{cell['error']:.3g} ({cell['evaluations']})"
            rows.setdefault(key, {})[cell["samples"]] = text
    head = ["function of 24 numbers", "method", "library", *(f"N = {n}" for n in SAMPLES)]
    return table(
        head, [[*key, *(row.get(n, NOTHING) for n in SAMPLES)] for key, row in rows.items()]
    )


def memory_table(result: dict[str, Any]) -> str:
    """Return the peak of memory of each rival against the number of pairs."""
    rows: dict[str, dict[int, str]] = {}
    for cell in result["cells"]:
        if cell["operation"] == "memory":
            label = result["rivals"][cell["rival"]]["label"]
            text = bytes_text(cell["peak_bytes"]) if cell["status"] == "ok" else cell["status"]
            rows.setdefault(label, {})[cell["samples"]] = text
    sizes = "-".join(map(str, MEMORY.sizes))
    head = [f"{sizes}, pairs:", *(str(n) for n in MEMORY_SAMPLES)]
    return table(
        head,
        [[label, *(row.get(n, NOTHING) for n in MEMORY_SAMPLES)] for label, row in rows.items()],
    )


TABLES = {"speed": speed_table, "error": error_table, "memory": memory_table}


def say(line: str) -> None:
    """Tell the user what takes time."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
