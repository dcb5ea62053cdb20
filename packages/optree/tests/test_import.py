# SPDX-License-Identifier: Apache-2.0
"""Importing optree is quick: it imports nothing optional, and little of the standard library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import optree

# Optional libraries that optree integrates, and modules of the standard library that few functions
# need.
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


@pytest.mark.differs_from_published
def test_a_replaced_defaultdict_is_refused() -> None:
    program = "import collections, typing; collections.defaultdict = list; import optree"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "expected collections.defaultdict to be a dict class, got <class 'list'>" in run.stderr


@pytest.mark.skipif(
    not (3, 11) <= sys.version_info < (3, 16)
    or optree._C.Py_GIL_DISABLED
    or optree._C.Py_DEBUG
    or sys.implementation.name != "cpython",
    reason="other Python builds have other internals",
)
def test_python_is_built_the_way_its_internals_are_used() -> None:
    # If a check of the internals fails, optree is only slower: no other test would notice it.
    held = dict(optree._C.CPYTHON_INTERNALS)
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        assert held.pop("gc_memory") is False  # reused memory hides errors from the sanitizer
    assert all(held.values()), held
