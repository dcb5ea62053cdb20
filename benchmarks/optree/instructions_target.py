# SPDX-License-Identifier: Apache-2.0
"""The program that callgrind runs: each operation, a fixed number of times.

Run by `instructions.py` as `-m benchmarks.optree.instructions_target MODULE TREE:OPERATION:N...`.
Every case runs in a fork of this process, so that no case affects another one, and all of them
start from the same state. The loop is entered through `ffi_call`, the function of libffi behind
`ctypes`, at which callgrind switches counting on and off.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import os
import sys
from typing import Any

from benchmarks.optree.operations import Inputs, statement_of

WARM_UP = 5


def prepare(rival: Any, tree: str, operation: str) -> Any:
    """Return a function that runs the operation once for every item of its argument."""
    found = statement_of(rival, operation)
    if found is None:
        raise SystemExit(f"{rival.__name__} has no operation {operation}")
    setup, statement = found
    used = compile(f"{setup}\n{statement}", "<instructions>", "exec").co_names
    names = Inputs(rival, tree).names(rival, set(used))
    exec(setup, names)
    exec(f"def run(times):\n    for _ in times: {statement}\n", names)
    return names["run"]


def main() -> None:
    """Run every case N times in its own process, after a few uncounted runs."""
    module, *cases = sys.argv[1:]
    rival = importlib.import_module(module)
    counted = ctypes.pythonapi.PyObject_CallObject
    counted.argtypes = (ctypes.py_object, ctypes.py_object)
    counted.restype = ctypes.py_object
    for case in cases:
        tree, operation, number = case.split(":")
        child = os.fork()
        if child == 0:
            run = prepare(rival, tree, operation)
            gc.collect()
            gc.disable()
            run(itertools.repeat(None, WARM_UP))
            counted(run, (itertools.repeat(None, int(number)),))
            os._exit(0)
        print(case, child, flush=True)
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit(f"{case} failed")


if __name__ == "__main__":
    main()
