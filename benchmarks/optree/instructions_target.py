# SPDX-License-Identifier: Apache-2.0
"""What callgrind watches: one operation, a number of times, and nothing else that varies.

Run by `instructions.py` as `-m benchmarks.optree.instructions_target MODULE TREE OPERATION N`.
"""

from __future__ import annotations

import gc
import importlib
import itertools
import sys

from benchmarks.optree.operations import Inputs, statement_of

WARM_UP = 5


def main() -> None:
    """Run the operation N times after a few uncounted ones."""
    module, tree, operation, number = sys.argv[1:]
    rival = importlib.import_module(module)
    found = statement_of(rival, operation)
    if found is None:
        raise SystemExit(f"{module} has no operation {operation}")
    setup, statement = found
    used = compile(f"{setup}\n{statement}", "<instructions>", "exec").co_names
    names = Inputs(rival, tree).names(rival, set(used))
    exec(setup, names)
    loop = f"def run(times):\n    for _ in times: {statement}\n"
    exec(loop, names)
    gc.collect()
    gc.disable()
    names["run"](itertools.repeat(None, WARM_UP))
    names["run"](itertools.repeat(None, int(number)))


if __name__ == "__main__":
    main()
