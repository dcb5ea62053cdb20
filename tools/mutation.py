# SPDX-License-Identifier: Apache-2.0
"""Make small wrong changes, one at a time, and see whether a test fails (cosmic-ray).

``tools/mutation.toml`` names groups of files, the tests that guard them and how many changes to
draw from each group. The draw is fixed by a seed, so that two runs judge the same changes. Changes
to annotations, to type-checking imports and to the texts of errors are not drawn: no test has to
see them. A change that survives fails the task, unless the table of equivalent changes there says
why no test can see it. The score of the last full run is in ``tools/mutation_score.json``.

Each worker works on a copy of the tracked files under ``build/mutation``.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import fnmatch
import importlib.util
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import tomllib
from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import MutationVisitor, mutate_and_test
from cosmic_ray.plugins import get_operator, operator_names
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "tools" / "mutation.toml"
SCORE = ROOT / "tools" / "mutation_score.json"
BUILD = ROOT / "build" / "mutation"
PACKAGES = ("optree", "torchopt")


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
    """Return where annotations and decorators of overloads begin and end."""
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
    """Return every change that can be made to a file and that a test should see."""
    source = (ROOT / path).read_text()
    quiet, spans = quiet_lines(source), annotation_spans(source)
    lines = source.splitlines()
    tree = get_ast(source)
    found = []
    for name in sorted(operator_names()):
        try:
            operator = get_operator(name)()
        except TypeError:  # one that has to be told what to insert
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
            found.append(
                {"file": path, "operator": name, "occurrence": occurrence, "start": start,
                 "end": end, "line": lines[start[0] - 1].strip()}
            )  # fmt: skip
    return found


def drawn(groups: dict[str, Any], chosen: list[str]) -> list[dict[str, Any]]:
    """Return the changes to judge, in a fixed random order."""
    picked = []
    for name, group in groups.items():
        if chosen and name not in chosen:
            continue
        files = sorted({str(p.relative_to(ROOT)) for g in group["files"] for p in ROOT.glob(g)})
        skipped = group.get("without", [])
        files = [f for f in files if not any(fnmatch.fnmatch(f, s) for s in skipped)]
        every = [change for file in files for change in changes_of(file)]
        for change in random.Random(name).sample(every, min(group["sample"], len(every))):
            change.update(group=name, tests=group["tests"], timeout=group.get("timeout", 300))
            picked.append(change)
    random.Random(0).shuffle(picked)
    return picked


def make_copy(folder: Path) -> None:
    """Copy tracked files and built extensions, and an environment that imports the copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "packages", "benchmarks", "tools", "pyproject.toml", "README.md",
         "CHANGELOG.md", "noxfile.py"], cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for package in PACKAGES:
        spec = importlib.util.find_spec(f"{package}._C")
        if spec is None or spec.origin is None:
            raise SystemExit(f"expected {package} with its extension, found none; run setup first")
        shutil.copy2(spec.origin, folder / "packages" / package / "src" / package)
    venv.create(folder / "venv", with_pip=False)
    sources = [folder / "packages" / package / "src" for package in PACKAGES]
    installed = [path for path in map(Path, sys.path) if path.name == "site-packages"]
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "copy.pth").write_text("\n".join(map(str, [*sources, *installed])) + "\n")


def judge(change: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make one change in a copy, run its tests, and take the change back."""
    os.chdir(folder)
    mutation = MutationSpec(
        change["file"], change["operator"], change["occurrence"], change["start"], change["end"]
    )
    python = folder / "venv" / "bin" / "python"
    command = [str(python), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *change["tests"]]
    started = time.monotonic()
    result = mutate_and_test([mutation], " ".join(command), change["timeout"])
    diff = [
        line
        for line in (result.diff or "").splitlines()
        if line[:1] in "+-" and line[:3] not in ("---", "+++")
    ]
    outcome = result.test_outcome.value if result.test_outcome else "not made"
    if result.test_outcome is TestOutcome.INCOMPETENT:
        outcome = "incompetent"
    keep = {k: change[k] for k in ("group", "file", "operator", "occurrence", "line")}
    seconds = round(time.monotonic() - started, 1)
    return {**keep, "outcome": outcome, "diff": diff, "seconds": seconds}


def work(number: int, changes: list[dict[str, Any]], log: Path) -> list[dict[str, Any]]:
    """Judge changes one after another in this worker's copy."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", PYTHONHASHSEED="0")
    folder = BUILD / f"copy{number}"
    shutil.rmtree(folder, ignore_errors=True)
    make_copy(folder)
    done = []
    with log.open("a") as out:
        for change in changes:
            done.append(judge(change, folder))
            print(json.dumps(done[-1]), file=out, flush=True)
    return done


def is_equivalent(found: dict[str, Any], table: list[dict[str, str]]) -> bool:
    """Return whether the table says why no test can see this change."""
    made = "\n".join(line[1:].strip() for line in found["diff"] if line.startswith("+"))
    return any(e["file"] == found["file"] and e["change"].strip() == made for e in table)


def main() -> int:
    """Draw, judge, report, and store the score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("groups", nargs="*", help="groups to judge; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=int, help="judge so many changes only")
    parser.add_argument("--store", action="store_true", help=f"write {SCORE.name}")
    options = parser.parse_args()
    settings = tomllib.loads(SETTINGS.read_text())
    changes = drawn(settings["groups"], options.groups)[: options.limit]
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / "judged.jsonl"
    log.unlink(missing_ok=True)
    print(f"{len(changes)} changes, {options.workers} workers; progress in {log.relative_to(ROOT)}")
    with concurrent.futures.ProcessPoolExecutor(options.workers) as pool:
        shares = [changes[i :: options.workers] for i in range(options.workers)]
        jobs = [pool.submit(work, i, share, log) for i, share in enumerate(shares)]
        results = [found for job in jobs for found in job.result()]
    return report(results, settings.get("equivalent", []), options.store)


def report(results: list[dict[str, Any]], table: list[dict[str, str]], store: bool) -> int:
    """Print the survivors and the score of each group; return 1 if one is unexplained."""
    score: dict[str, dict[str, int]] = {}
    unexplained = []
    for found in sorted(results, key=lambda f: (f["group"], f["file"], f["occurrence"])):
        row = score.setdefault(found["group"], {"made": 0, "caught": 0, "equivalent": 0})
        if found["outcome"] == "not made":
            continue
        row["made"] += 1
        if found["outcome"] != "survived":
            row["caught"] += 1
        elif is_equivalent(found, table):
            row["equivalent"] += 1
        else:
            unexplained.append(found)
    for found in unexplained:
        print(f"\nsurvived: {found['file']} ({found['operator']})")
        print("\n".join(found["diff"]))
    print()
    for name, row in score.items():
        print(
            f"{name:24}{row['made']:5} made{row['caught']:5} caught{row['equivalent']:5} equivalent"
        )
    if store:
        stamp = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
        SCORE.write_text(json.dumps({**stamp, "groups": score}, indent=1) + "\n")
    return 1 if unexplained else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
