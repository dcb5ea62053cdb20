# SPDX-License-Identifier: Apache-2.0
"""Importing optree is quick: nothing optional, and of the standard library only what it needs."""

from __future__ import annotations

import subprocess
import sys

# Libraries that optree works with when asked, and modules of the standard library that few
# functions need.
LATE = {"attr", "attrs", "difflib", "jax", "json", "numpy", "platform", "torch"}


def test_importing_imports_nothing_that_few_need() -> None:
    program = (
        "import sys; before = set(sys.modules); import optree; "
        "print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = {name.partition(".")[0] for name in run.stdout.split()}
    assert "optree" in found
    assert not found & LATE
