# SPDX-License-Identifier: Apache-2.0
"""Fill the benchmark tables of Markdown files from the stored results.

A pair of comments marks the place of a table, and everything between them is generated::

    <!-- bench:begin optree published -->
    <!-- bench:end -->

The two words name a suite and a table. The result is ``benchmarks/results/<suite>.json``, and
``<table>_table`` of ``benchmarks/<suite>/report.py`` (or of the module in ``REPORTS``) makes the
text from it, preceded by the machine and versions on which it was measured. Further tables of the
same measurement on a page refer to the section of the first. No number is written by hand.

The images in ``PICTURES`` are drawn from the same results.

``python tools/bench_report.py`` rewrites the files; ``--check`` only reports the stale ones.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "README.md",
    "packages/optree/README.md",
    "packages/optree/docs/benchmarks.md",
    "packages/optree/docs/benchmarks_operations.md",
    "packages/optree/docs/benchmarks_pythons.md",
    "packages/optree/docs/benchmarks_trees.md",
    "packages/torchopt/README.md",
    "packages/torchopt/docs/engines.md",
    "packages/torchopt/docs/benchmarks.md",
    "packages/torchopt/docs/distributed.md",
    "packages/torchopt/docs/reference/linear_solve.md",
    "packages/torchopt/docs/reference/solvers.md",
)
# Suite and plot: `<plot>_plot` of the suite's report draws the image, which contains the time stamp
# of its result.
PICTURES = {
    "packages/optree/docs/speed.png": ("optree", "speed"),
    "packages/optree/docs/leads.png": ("optree", "leads"),
    "packages/torchopt/docs/speed.png": ("torchopt", "speed"),
}
# The modules that make the tables of suites that have no folder of their own.
REPORTS = {
    "engines_explicit": "benchmarks.engines.report",
    "torchopt_implicit": "benchmarks.torchopt.implicit.report",
    "torchopt_zero_order": "benchmarks.torchopt.zero_order.report",
    "torchopt_meta_steps": "benchmarks.torchopt.meta_steps.report",
    "torchopt_distributed": "benchmarks.torchopt.distributed_report",
    "torchopt_distributed_load": "benchmarks.torchopt.distributed_report",
    "optree_newest": "benchmarks.optree.report",
    "optree_pythons": "benchmarks.optree.pythons",
    "optree_threads": "benchmarks.optree.threads_report",
}
BLOCK = re.compile(r"(<!-- bench:begin (\w+) (\w+) -->\n)(.*?)(<!-- bench:end -->)", re.DOTALL)

HEADING = re.compile(r"^#{1,3} (.+)$", re.MULTILINE)

Render = Callable[[str, str], tuple[str, str]]


class ReportError(ValueError):
    """A marker names a suite, a table or a result that does not exist."""


def _stored(suite: str, root: Path) -> Path:
    return root / "benchmarks" / "results" / f"{suite}.json"


def _result(suite: str, root: Path) -> Any:
    stored = _stored(suite, root)
    try:
        return json.loads(stored.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"expected JSON in {stored.relative_to(root)}, got {error}") from error


def _report(suite: str, root: Path) -> Any:
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    module = REPORTS.get(suite, f"benchmarks.{suite}.report")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ReportError(f"expected the module {module}, found none ({error})") from error


def picture_is_stale(picture: str, suite: str, root: Path = ROOT) -> bool:
    """Return whether an image is missing or was drawn from another result."""
    path = root / picture
    stamp: str = _result(suite, root)["created"]
    return not path.is_file() or stamp.encode() not in path.read_bytes()


def render(suite: str, table: str, root: Path = ROOT) -> tuple[str, str]:
    """Return the machine on which a table was measured, if it was, and the table, as Markdown.

    Raises:
        ReportError: If the suite or the table does not exist, or the stored result cannot be read.
    """
    if not _stored(suite, root).is_file():
        return "", "No result is stored; `python3 tools/dev.py bench` measures and stores one."
    result, report = _result(suite, root), _report(suite, root)
    make = getattr(report, f"{table}_table", None)
    if make is None:
        known = ", ".join(n.removesuffix("_table") for n in dir(report) if n.endswith("_table"))
        raise ReportError(f"expected a table of {suite} ({known}), got {table!r}")
    text = make(result).strip()
    measured = not text.startswith("Not measured yet")
    return report.machine_lines(result).strip() if measured else "", text


def fill(text: str, render_table: Render) -> str:
    """Return ``text`` with a new table between each pair of markers.

    Raises:
        ReportError: If a marker has no partner.
    """
    blocks = len(BLOCK.findall(text))
    begins, ends = text.count("<!-- bench:begin"), text.count("<!-- bench:end -->")
    if not blocks == begins == ends:
        raise ReportError(
            f"expected pairs of `bench:begin SUITE TABLE` and `bench:end`, got {begins} begins and "
            f"{ends} ends, of which {blocks} pair up"
        )
    first: dict[str, str] = {}  # the section in which a measurement is described

    def filled(match: re.Match[str]) -> str:
        machine, table = render_table(match[2], match[3])
        if machine in first:
            machine = f"Measured as under {first[machine]}."
        elif machine:
            title = HEADING.findall(text[: match.start()])[-1:]
            first[machine] = f"[{title[0]}](#{anchor(title[0])})" if title else "the first table"
        return "\n\n".join([match[1].rstrip(), *filter(None, (machine, table)), match[5]])

    return BLOCK.sub(filled, text)


def anchor(title: str) -> str:
    """Return the anchor of a heading, as GitHub and MyST make it.

    >>> anchor("Adam, with `foreach`")
    'adam-with-foreach'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def main(arguments: Sequence[str]) -> int:
    """Rewrite the files or check them, and return the exit status."""
    parser = argparse.ArgumentParser(description="Fill benchmark tables from stored results.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail on a stale file")
    check = parser.parse_args(arguments).check
    stale = 0
    for name in FILES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        try:
            filled = fill(text, render)
        except ReportError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        if filled == text:
            continue
        if check:
            print(f"{name}: a benchmark table is stale; run tools/bench_report.py", file=sys.stderr)
            stale += 1
        else:
            path.write_text(filled, encoding="utf-8")
            print(f"{name}: tables rewritten")
    for name, (suite, plot) in PICTURES.items():
        if not picture_is_stale(name, suite):
            continue
        if check:
            print(f"{name}: this image is stale; run tools/bench_report.py", file=sys.stderr)
            stale += 1
        else:
            draw = getattr(_report(suite, ROOT), f"{plot}_plot")
            draw(_result(suite, ROOT), ROOT / name)
            print(f"{name}: drawn")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
