# SPDX-License-Identifier: Apache-2.0
"""Time torchopt against its peers: steps in place, functional, differentiated, and meta-learning.

    python -m benchmarks.torchopt.run                   # everything
    python -m benchmarks.torchopt.run --quick           # shorter rounds, small cases
    python -m benchmarks.torchopt.run --group step      # step, optimizers, matrices, meta, tasks

Results go to `benchmarks/results/torchopt.json`, the tables to the terminal. ATen operations and
peak bytes are counted, once each.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.harness.program import Group, Suite, main
from benchmarks.harness.tournament import Effort
from benchmarks.torchopt import matrices, problems, report, tasks
from benchmarks.torchopt.rivals import rivals

SETS = ("6 x 1k", "50 x 1k", "500 x 1k", "5000 x 1k", "ResNet-50", "transformer, 12 blocks")
OPTIMIZERS = (
    "sgd", "momentum", "adamw", "amsgrad", "nadam", "radam", "adamax", "rmsprop", "adagrad",
    "adadelta", "asgd", "rprop", "adafactor",
)  # fmt: skip
MODELS = ("MLP", "conv4", "transformer, 2 blocks")
STEPS = (1, 5, 10, 20, 50)


def steps(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of one step of Adam."""
    sets = SETS[:3] if quick else SETS
    operations = ("adam", "functional", "differentiable")
    return [{"tree": name, "operation": op} for op in operations for name in sets]


def optimizers(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of one step in place of the others."""
    sets = (report.EACH_OPTIMIZER,) if quick else SETS
    return [{"tree": tree, "operation": name} for tree in sets for name in OPTIMIZERS]


def matrix_steps(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of one step in place of the optimizers of matrices."""
    sets = list(problems.MATRICES)[: 1 if quick else None]
    cases = [{"tree": tree, "operation": name} for name in matrices.STEPS for tree in sets]
    # The loop takes half a minute for the widest step of Shampoo.
    return cases[:-1] if len(sets) > 1 else cases


def meta(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of meta-steps."""
    numbers = STEPS[:2] if quick else STEPS
    return [{"tree": m, "operation": "meta", "steps": n} for m in MODELS for n in numbers]


def whole_tasks(quick: bool) -> list[dict[str, Any]]:
    """Return the cases of whole tasks on small networks."""
    networks = list(tasks.NETWORKS)[: 1 if quick else None]
    return [{"tree": n, "operation": op} for op in tasks.OPTIMIZERS for n in networks]


SUITE = Suite(
    "torchopt",
    "benchmarks.torchopt.suite",
    rivals,
    {
        "step": Group(steps, counted="count"),
        "optimizers": Group(optimizers, counted="count"),
        "matrices": Group(matrix_steps, counted="count"),
        "meta": Group(meta, counted="count"),
        "tasks": Group(whole_tasks, counted="count"),
    },
    {
        "step": report.step_table,
        "optimizers": report.optimizers_table,
        "matrices": report.matrices_table,
        "meta": report.meta_table,
        "tasks": report.tasks_table,
    },
    Effort(rounds=5, seconds=0.05, sample_seconds=0.01, slow_seconds=3.0),
)

if __name__ == "__main__":
    sys.exit(main(SUITE))
