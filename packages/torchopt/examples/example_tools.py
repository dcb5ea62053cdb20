# SPDX-License-Identifier: Apache-2.0
"""Code that the examples share: options, progress bars, data, results and plots."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchopt

__all__ = [
    "digits",
    "fastest_ms",
    "flat_table",
    "mean_and_half_width",
    "plot_curves",
    "progress",
    "run_example",
]


def progress(total: int, label: str, *, shown: bool = True) -> Any:
    """Return a progress bar; of several processes only one shows it."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=label,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not shown,
    )


def digits() -> tuple[Tensor, Tensor]:
    """Return the 1797 images of scikit-learn, `[1797, 64]`, and their labels, `[1797]`.

    Pixels have mean 0 and standard deviation 1. The order is fixed, and mixes writers and classes.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).flatten(1) / 16
    images = (images - 0.305) / 0.376  # mean and deviation of all pixels
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(found.target)[order]


def mean_and_half_width(values: Tensor) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % confidence interval."""
    return values.mean().item(), 1.96 * values.std().item() / len(values) ** 0.5


def fastest_ms(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the shortest time of each function in milliseconds; the functions take turns."""
    times = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name] = min(times[name], 1e3 * (time.perf_counter() - started))
    return times


def flat_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, with the first column aligned left and the others right.

    >>> print(flat_table([["", "loss"], ["MAML", "0.1"]]))
          loss
    MAML   0.1
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def plot_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    covered: str = "",
    **settings: Any,
) -> None:
    """Write a plot of labelled curves, each a sequence of (x, y).

    Args:
        curves: The curves by label.
        path: The file.
        covered: The label of a curve that another one covers; it is drawn wide.
        settings: Those of axes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for label, curve in curves.items():
        axes.plot(*zip(*curve), label=label, linewidth=4.5 if label == covered else 1.5)
    axes.set(**settings)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def run_example(
    doc: str | None,
    name: str,
    presets: Mapping[str, Any],
    run: Callable[[Any, Path], dict[str, Any]],
    report: Callable[[dict[str, Any]], bool],
    arguments: Sequence[str] | None,
) -> int:
    """Parse the options of an example, run it, write `<name>.json` and print its report.

    Args:
        doc: Docstring of the example.
        name: Name of the example.
        presets: Settings: frozen dataclasses with a field `seed`, named "full" and "smoke".
        run: Takes the settings and the folder for plots; returns results that JSON can store.
        report: Prints the table of results and returns whether the result of the paper was reached.
        arguments: The arguments of the command line.

    Returns:
        The exit status: 1 if a full run did not reach the result.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="seconds; too short to be judged")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where to write (out)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    config = replace(presets["smoke" if options.smoke else "full"], seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    # The tensors are small: a second thread saves nothing.
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    started = time.perf_counter()
    try:
        results = run(config, options.out)
    finally:
        torch.set_num_threads(threads)
    results = {
        "config": asdict(config),
        **results,
        "seconds": time.perf_counter() - started,
        "torch": torch.__version__,
        "torchopt": torchopt.__version__,
    }
    path = options.out / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print()
    reached = report(results)
    print(f"{results['seconds']:.0f} s; wrote {path}")
    if options.smoke:
        print("smoke run: too short, not judged")
        return 0
    print("reached" if reached else "NOT REACHED: the result of the paper did not come out")
    return 0 if reached else 1
