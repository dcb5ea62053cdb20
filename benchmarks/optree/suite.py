# SPDX-License-Identifier: Apache-2.0
"""The part that runs in a rival's process: it turns a case into a checked statement."""

from __future__ import annotations

import ctypes
import gc
import itertools
from pathlib import Path
from typing import Any

from benchmarks.harness.case import Prepared, UnsupportedError, describe
from benchmarks.optree.answers import check_core, digest
from benchmarks.optree.expected import check_other
from benchmarks.optree.operations import MATRIX, NOT_COMPARED, Inputs, statement_of
from benchmarks.optree.trees import COLD_TREES, cold_batch, make_tree, numbered_leaf

__all__ = ["describe", "memory", "peak", "prepare"]

_salt = itertools.count()

# The trees on which flatten, unflatten and map were checked, and the inputs of the last case: the
# next case often has the same tree, and a large tree takes seconds to make.
_checked: set[str] = set()
_last: dict[str, Inputs] = {}


def _inputs(rival: Any, tree_name: str) -> Inputs:
    if tree_name not in _last:
        _last.clear()
        _last[tree_name] = Inputs(rival, tree_name)
    return _last[tree_name]


def prepare(rival: Any, case: dict[str, Any]) -> Prepared:
    """Return the statement of a case, after its answer has been checked.

    Args:
        rival: the module that adapts the library.
        case: `tree` and `operation`, names of the tables.

    Raises:
        UnsupportedError: the library has no such operation.
        WrongAnswerError: the answer is wrong.
    """
    tree_name, operation = case["tree"], case["operation"]
    found = statement_of(rival, operation)
    if found is None:
        raise UnsupportedError("no such operation")
    setup, statement = found
    if tree_name in COLD_TREES:
        return _prepare_cold(rival, tree_name, statement)
    code = compile(f"{setup}\n{statement}", "<benchmark>", "exec")
    inputs = _inputs(rival, tree_name)
    names = inputs.names(rival, set(code.co_names))
    try:
        exec(setup, names)
        answer = eval(statement, names)
    except AttributeError as error:
        if "has no attribute" in str(error):
            raise UnsupportedError(str(error)) from error
        raise
    if operation in MATRIX:
        if tree_name not in _checked:
            check_core(rival, inputs.tree)
            _checked.add(tree_name)
        return Prepared(statement, names)
    check_other(rival, operation, answer, inputs)
    compared = rival.COMPARABLE and operation not in NOT_COMPARED
    return Prepared(statement, names, digest(answer) if compared else None)


def _prepare_cold(rival: Any, tree_name: str, statement: str) -> Prepared:
    """Return a statement that visits new trees in every run."""
    cold = COLD_TREES[tree_name]
    _last.clear()
    names: dict[str, Any] = {**vars(rival)}
    sample = cold_batch(tree_name, "check")[0]
    check_core(rival, sample)

    def renew() -> None:
        names["trees"] = ()
        gc.collect()
        # The count of the process makes "new" keys new in each case.
        names["trees"] = cold_batch(tree_name, str(next(_salt)))

    return Prepared(statement, names, repetitions=cold.batch, renew=renew)


# ------------------------------------------------------------------------------ memory


class _MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks"),
            *("fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _bytes_in_use() -> int:
    """Return the bytes that are allocated now, by everything in the process.

    Python must run with PYTHONMALLOC=malloc, so that its own objects count too.
    """
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except AttributeError as error:
        raise UnsupportedError(
            "memory is counted by glibc's mallinfo2, version 2.33 or later"
        ) from error
    mallinfo.restype = _MallocInfo
    info = mallinfo()
    return int(info.uordblks + info.hblkhd)


def memory(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the bytes of a spec and the peak of flattening, without the tree and its leaves.

    The first spec of a tree also pays for what later ones share (names, key tables); the
    figure for a further spec is the mean over `copies` equal ones.

    Args:
        rival: the module that adapts the library.
        case: `tree`, and `copies` of its spec to make.

    Raises:
        UnsupportedError: the library has no specs, or this system does not count bytes.
    """
    if not rival.HAS_SPECS:
        raise UnsupportedError("the library keeps no spec")
    rival.parts(make_tree("tuple3", numbered_leaf()))
    tree = make_tree(case["tree"], numbered_leaf())
    copies = int(case["copies"])
    gc.collect()
    start = _bytes_in_use()
    leaves, first = rival.parts(tree)
    number = len(leaves)
    del leaves
    gc.collect()
    after_first = _bytes_in_use()
    specs = [rival.parts(tree)[1] for _ in range(copies)]
    gc.collect()
    after_all = _bytes_in_use()
    del specs, first
    return {
        "leaves": number,
        "first_bytes": after_first - start,
        "further_bytes": (after_all - after_first) / copies if copies else None,
    }


def peak(rival: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Return the increase of the process's resident memory while a tree is flattened.

    Args:
        rival: the module that adapts the library.
        case: `tree`.

    Raises:
        UnsupportedError: this system does not tell the peak.
    """
    tree = make_tree(case["tree"], numbered_leaf())
    rival.flatten(make_tree("tuple3", numbered_leaf()))
    gc.collect()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # reset the peak
        before = _status_bytes("VmRSS")
        answer = rival.flatten(tree)
        after = _status_bytes("VmHWM")
    except OSError as error:
        raise UnsupportedError(
            "the peak is read from /proc/self/status, which is Linux's"
        ) from error
    del answer
    return {"peak_bytes": after - before}


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")
