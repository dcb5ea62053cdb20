# SPDX-License-Identifier: Apache-2.0
"""Make small wrong changes, one at a time, and check whether a test fails (cosmic-ray).

``tools/mutation.toml`` names groups of files, the tests that guard them and how many changes to
draw from each group. The draw depends on the text of each line and a seed alone: an edit elsewhere
leaves it as it is. Changes to annotations, to type-checking imports and to the texts of errors are
not drawn, because no test has to detect them. ``tools/mutation_named.toml`` lists wrong lines that
survived once, with the tests that detect them now.

A change that survives fails the task, unless the table of equivalent changes in
``tools/mutation.toml`` says why no test can detect it. The score of the last full run is in
``tools/mutation_score.json``.

A change is tested by the tests near its file first: those that the table ``near`` of its group
names, or else those in a file named after it. If it survives, a recording says which test runs
which line, and all tests that run its statement test it, the fastest first, for up to ``--budget``
seconds of processor time. What was judged is kept in ``build/mutation``, and is judged again only
if the changed file or its tests change.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import difflib
import fnmatch
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import tomllib
from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import MutationVisitor, mutate_code
from cosmic_ray.plugins import get_operator, operator_names

import mutation_run

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "tools" / "mutation.toml"
NAMED = ROOT / "tools" / "mutation_named.toml"
SCORE = ROOT / "tools" / "mutation_score.json"
BUILD = ROOT / "build" / "mutation"
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONHASHSEED": "0"}
NO_NUMBERS = ("BitAnd", "BitOr", "BitXor", "LShift", "RShift", "Invert")
CAUGHT = ("caught", "incompetent", "timeout")


def quiet_lines(source: str) -> set[int]:
    """Return the lines of annotations, type-checking imports, ``__all__`` and raised messages."""
    lines: set[int] = set()

    def take(node: ast.AST | None) -> None:
        if node is not None:
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # type: ignore[attr-defined]

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            take(node.exc)
        elif _is_quiet(node):
            take(node)
    return lines


def _is_quiet(node: ast.AST) -> bool:
    if isinstance(node, ast.AnnAssign):
        return node.value is None
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0]) == "__all__"
    return isinstance(node, ast.ImportFrom)


def annotation_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the start and end of annotations and of the decorators of overloads."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        found: list[ast.expr | None] = []
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.returns)
            if any("overload" in ast.unparse(d) for d in node.decorator_list):
                spans.append(((node.decorator_list[0].lineno, 0), (node.end_lineno or 0, 10**6)))
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            found.append(node.annotation)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "TypeVar"):
            found.append(node)
        spans.extend(
            ((x.lineno, x.col_offset), (x.end_lineno or 0, x.end_col_offset or 0))
            for x in found
            if x is not None
        )
    return spans


def changes_of(path: str) -> list[dict[str, Any]]:
    """Return every possible change of a file that a test should detect."""
    source = (ROOT / path).read_text()
    quiet, spans = quiet_lines(source), annotation_spans(source)
    lines = source.splitlines()
    tree = get_ast(source)
    twins: Counter[tuple[str, str]] = Counter()
    found = []
    for name in sorted(operator_names()):
        try:
            operator = get_operator(name)()
        except TypeError:  # an operator that needs the text to insert
            continue
        positions: list[Any] = []

        class Visitor(MutationVisitor):  # type: ignore[misc]
            def visit(self, node: Any) -> Any:
                positions.extend(self.operator.mutation_positions(node))  # noqa: B023
                return node

        Visitor(-1, operator).walk(tree)
        for occurrence, (start, end) in enumerate(positions):
            if start[0] in quiet or any(a <= start <= b for a, b in spans):
                continue
            line = lines[start[0] - 1].strip()
            twins[name, line] += 1
            found.append(
                {"file": path, "operator": name, "occurrence": occurrence, "start": start,
                 "end": end, "line": line, "twin": twins[name, line]}
            )  # fmt: skip
    return found


def tries_a_test(change: dict[str, Any]) -> bool:
    """Return whether a change gives a valid program: `f(a, *, b)` cannot have `-` for its star.

    Bit operations on floats are excluded as well: `x & y` for `x * y` fails wherever it runs.
    """
    if change["operator"].rpartition("_")[2] in NO_NUMBERS:
        return False
    try:
        ast.parse(changed_text(change) or "")
    except SyntaxError:
        return False
    return True


def changed_text(change: dict[str, Any]) -> str | None:
    """Return the text of the file with the change, or None if the change cannot be made."""
    source = (ROOT / change["file"]).read_text()
    text: str | None = mutate_code(source, get_operator(change["operator"])(), change["occurrence"])
    return text


def files_of(group: dict[str, Any]) -> list[str]:
    """Return the files of a group."""
    files = sorted({str(p.relative_to(ROOT)) for g in group["files"] for p in ROOT.glob(g)})
    return [f for f in files if not any(fnmatch.fnmatch(f, s) for s in group.get("without", []))]


def known_changes_of(path: str) -> list[dict[str, Any]]:
    """Return `changes_of` a file, from ``build/mutation`` if the file was parsed before."""
    text = repr((path, (ROOT / path).read_text(), sorted(operator_names())))
    kept = BUILD / "changes" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.pickle"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(pickle.dumps(changes_of(path)))
    found: list[dict[str, Any]] = pickle.loads(kept.read_bytes())
    return found


def drawn(name: str, group: dict[str, Any], seed: str) -> list[dict[str, Any]]:
    """Return the changes of a group to test: those with the smallest hashes."""

    def rank(change: dict[str, Any]) -> bytes:
        same = (name, seed, *(change[k] for k in ("file", "operator", "line", "twin")))
        return hashlib.sha256(repr(same).encode()).digest()

    every = sorted((c for file in files_of(group) for c in known_changes_of(file)), key=rank)
    return list(itertools.islice(filter(tries_a_test, every), group["sample"]))


def judge(
    change: dict[str, Any], names: list[str], limit: float, alone: bool = False
) -> dict[str, Any]:
    """Make one change and run its tests, unless that was done before."""
    source, changed = (ROOT / change["file"]).read_text(), change["changed"]
    files = sorted({name.partition("::")[0] for name in names})
    tests = [(ROOT / file).read_bytes() for file in files]
    key = hashlib.sha256(repr((change["file"], changed, names, tests)).encode()).hexdigest()[:16]
    kept = BUILD / "judged" / f"{key}.json"
    if kept.exists():
        outcome = json.loads(kept.read_text())
    else:
        started = mutation_run.processor_seconds()
        outcome = {"outcome": mutation_run.judge(change["file"], changed, names, limit)}
        outcome["seconds"] = round(mutation_run.processor_seconds() - started, 1)
        if alone or outcome["outcome"] != "timeout":
            kept.write_text(json.dumps(outcome))
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), n=0)
    diff = [line for line in lines if line[:1] in "+-" and line[:3] not in ("---", "+++")]
    return {"file": change["file"], "diff": diff, "tests": len(names), **outcome}


def judged(
    name: str, changes: list[dict[str, Any]], names: list[list[str]], limits: list[float], pool: Any
) -> list[Any]:
    """Return changes with their outcomes. Those that were stopped for time are tried again alone,
    after the others, so that a process that waited for another one does not count as caught.
    """
    found = []
    for change in pool.map(judge, changes, names, limits):
        found.append({"group": name, **change})
        print(f"  {change['seconds']:6.1f} s  {change['outcome']:12}{change['file']}", flush=True)
    for k, change in enumerate(found):
        if change["outcome"] == "timeout":
            again = pool.submit(judge, changes[k], names[k], limits[k], True).result()
            found[k] = {"group": name, **again}
            print(f"  alone: {found[k]['outcome']:12}{change['file']}", flush=True)
    return found


def tests_near(file: str, group: dict[str, Any]) -> list[str]:
    """Return the tests that the table `near` of a group names, else those named after the file."""
    every = mutation_run.test_files(group["tests"])
    near = [glob for source, globs in group.get("near", {}).items()
            if fnmatch.fnmatch(file, f"*/{source}") for glob in globs]  # fmt: skip
    names = []
    for glob in near or [f"*/test_{Path(file).stem}.py"]:
        files, colons, test = glob.partition("::")
        names += [f + colons + test for f in every if fnmatch.fnmatch(f, files)]
    return names


def limits_of(changes: list[dict[str, Any]], names: list[list[str]], pool: Any) -> list[float]:
    """Return how long each change may be tested: far longer than its tests take without a change.

    They must pass without it.
    """
    files = {tuple(tests): change["file"] for change, tests in zip(changes, names)}
    sound = [{"file": f, "changed": (ROOT / f).read_text()} for f in files.values()]
    rows = [list(tests) for tests in files]
    took = {}
    for tests, found in zip(files, pool.map(judge, sound, rows, [1200.0] * len(rows))):
        if found["outcome"] != "survived":
            raise SystemExit(f"expected {tests} to pass without a change, got: {found['outcome']}")
        took[tests] = found["seconds"]
    return [20 + 3 * took[tuple(tests)] for tests in names]


def judged_sample(
    name: str,
    group: dict[str, Any],
    table: list[dict[str, str]],
    options: argparse.Namespace,
    pool: Any,
) -> list[Any]:
    """Return the drawn changes of a group with their outcomes."""
    changes = drawn(name, group, options.seed)[: options.limit]
    changes = [{**c, "changed": changed_text(c)} for c in changes]
    near = [tests_near(change["file"], group) for change in changes]
    print(f"{name}: {len(changes)} changes, by the tests near them", flush=True)
    found = judged(name, changes, near, limits_of(changes, near, pool), pool)
    left = [
        k
        for k, each in enumerate(found)
        if each["outcome"] == "survived" and why_equivalent(each, table) is None
    ]
    if not left:
        return found
    print(f"{name}: {len(left)} changes, by all tests that run their lines", flush=True)
    changes = [changes[k] for k in left]
    files = sorted({change["file"] for change in changes})
    seconds, lines = mutation_run.recorded(group["tests"], files, 1800, pool.map)
    names = [
        mutation_run.tests_of(c["file"], c["start"][0], seconds, lines, options.budget)
        for c in changes
    ]
    limits = [60 + 3 * sum(seconds[test] for test in chosen) for chosen in names]
    for k, again in zip(left, judged(name, changes, names, limits, pool)):
        found[k] = again
    return found


def judged_named(options: argparse.Namespace, pool: Any) -> list[Any]:
    """Return the wrong lines of the table with their outcomes."""
    changes, names = [], []
    for row in tomllib.loads(NAMED.read_text())["wrong"][: options.limit]:
        source = (ROOT / row["file"]).read_text()
        if row["line"] not in source:
            raise SystemExit(f"{row['file']}: expected the line {row['line']!r}, did not find it")
        changes.append({"file": row["file"], "changed": source.replace(row["line"], row["change"])})
        names.append(row["tests"])
    print(f"named: {len(changes)} changes", flush=True)
    return judged("named", changes, names, limits_of(changes, names, pool), pool)


def why_equivalent(found: dict[str, Any], table: list[dict[str, str]]) -> str | None:
    """Return why no test can detect this change, or None if the table does not say."""
    made = "\n".join(line[1:].strip() for line in found["diff"] if line.startswith("+"))
    for row in table:
        pattern = row.get("pattern") or re.escape(row["change"].strip())
        if row["file"] == found["file"] and re.fullmatch(pattern, made):
            return row["reason"]
    return None


def main() -> int:
    """Draw, judge, report, and store the score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="groups to test, and `named`; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests per change")
    parser.add_argument("--seed", default="", help="draws another sample than the stored one")
    parser.add_argument("--limit", type=int, help="number of changes to test in a group")
    parser.add_argument("--store", action="store_true", help=f"write {SCORE.name}")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # test names may depend on it
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **QUIET})
    settings = tomllib.loads(SETTINGS.read_text())
    groups = {k: g for k, g in settings["groups"].items() if k in (options.groups or [k])}
    table = settings.get("equivalent", [])
    (BUILD / "judged").mkdir(parents=True, exist_ok=True)
    mutation_run.warm_up()
    fork = multiprocessing.get_context("fork")
    unexplained = 0
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=fork) as pool:
        if "named" in (options.groups or ["named"]):
            unexplained += report("named", judged_named(options, pool), table, options.store)
        for name, group in groups.items():
            found = judged_sample(name, group, table, options, pool)
            unexplained += report(name, found, table, options.store)
    return int(unexplained > 0)


def report(
    name: str, results: list[dict[str, Any]], table: list[dict[str, str]], store: bool
) -> int:
    """Print the survivors and the score of a group; return how many are unexplained."""
    results = sorted(results, key=lambda found: (found["file"], found["diff"]))
    survivors = [
        {"group": name, "file": x["file"], "diff": x["diff"], "reason": why_equivalent(x, table)}
        for x in results
        if x["outcome"] not in CAUGHT
    ]
    unexplained = [found for found in survivors if found["reason"] is None]
    for found in unexplained:
        print(f"\nsurvived: {found['file']}", *found["diff"], sep="\n")
    equivalent = len(survivors) - len(unexplained)
    row = {"made": len(results), "caught": len(results) - len(survivors), "equivalent": equivalent}
    print(f"\n{name:24}" + "".join(f"{count:5} {what}" for what, count in row.items()), flush=True)
    if store:
        _store(name, row, [(x["file"], x["diff"]) for x in results], survivors)
    return len(unexplained)


def _store(name: str, row: dict[str, Any], sample: list[Any], survivors: list[Any]) -> None:
    """Replace a group in the file of the scores.

    `caught_at_first` stays while the sample does: how many were caught before tests were written
    for the others.
    """
    old = json.loads(SCORE.read_text()) if SCORE.exists() else {}
    before = old.get("groups", {}).get(name, {})
    drawn_now = hashlib.sha256(repr(sample).encode()).hexdigest()[:12]
    same = before.get("sample", drawn_now) == drawn_now and "caught_at_first" in before
    first = before["caught_at_first"] if same else row["caught"]
    stamp = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    new = {**row, "caught_at_first": first, "sample": drawn_now, **stamp}
    kept = [found for found in old.get("survivors", []) if found["group"] != name]
    groups = {**old.get("groups", {}), name: new}
    all_of_it = {**old, "groups": groups, "survivors": kept + survivors}
    SCORE.write_text(json.dumps(all_of_it, indent=1) + "\n")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
