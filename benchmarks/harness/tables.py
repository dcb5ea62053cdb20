# SPDX-License-Identifier: Apache-2.0
"""Tables as Markdown text, which reads well on a terminal too."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns: words to the left, figures to the right.

    >>> print(table(["tree", "operation", "time"], [["list", "map", "3 s"]]))
    | tree | operation | time |
    |------|-----------|-----:|
    | list | map       |  3 s |
    """
    lines = [list(head), *(list(row) for row in rows)]
    words = [column == 0 or _words(row[column] for row in rows) for column in range(len(head))]
    widths = [max(_width(line[column]) for line in lines) for column in range(len(head))]

    def draw(line: list[str]) -> str:
        cells = [
            text + " " * (width - _width(text))
            if words[column]
            else " " * (width - _width(text)) + text
            for column, (text, width) in enumerate(zip(line, widths))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "|".join(
        "-" * (width + 2) if words[column] else "-" * (width + 1) + ":"
        for column, width in enumerate(widths)
    )
    return "\n".join([draw(lines[0]), f"|{rule}|", *(draw(line) for line in lines[1:])])


def _words(cells: Iterable[str]) -> bool:
    """Return whether a column has words, that is, no figures and no marks of missing figures."""
    return not any(cell[:1].isdigit() or cell[:1] in ("-", NOTHING) for cell in cells)


def _width(text: str) -> int:
    return sum(1 + (unicodedata.east_asian_width(letter) in "FW") for letter in text)


# The text of a cell without a figure.
NOTHING = "\u2013"


def seconds_text(seconds: float | None) -> str:
    """Return a time in a unit that needs no exponent.

    >>> seconds_text(1.234e-5), seconds_text(2.5e-9), seconds_text(None)
    ('12.3 µs', '2.5 ns', '–')
    """
    if seconds is None:
        return NOTHING
    for factor, unit in ((1e9, "ns"), (1e6, "µs"), (1e3, "ms"), (1.0, "s")):
        scaled = seconds * factor
        if scaled < 1000 or unit == "s":
            return f"{_three_digits(scaled)} {unit}"
    raise AssertionError("unreachable")


def spread_text(median: float | None, least: float | None) -> str:
    """Return a median, and by how many per cent the minimum is below it.

    >>> spread_text(1.25e-5, 1.2e-5), spread_text(2e-9, 2e-9), spread_text(None, None)
    ('12.5 µs −4 %', '2 ns −0 %', '–')
    """
    if median is None or least is None:
        return NOTHING
    return f"{seconds_text(median)} \u2212{100 * (1 - least / median):.0f} %"


def ratio_text(ratio: float | None) -> str:
    """Return a ratio of times with two or three digits.

    >>> ratio_text(0.8123), ratio_text(12.34), ratio_text(431.2), ratio_text(None)
    ('0.81x', '12.3x', '431x', '–')
    """
    return NOTHING if ratio is None else _three_digits(ratio) + "x"


def ratio_table(
    figures: Any,
    rivals: dict[str, Any],
    pairs: Sequence[tuple[str, str]],
    labels: Sequence[Sequence[str]],
    head: Sequence[str],
) -> str:
    """Return our time with its spread, and every rival's time as a multiple of it.

    Args:
        figures: `results.Figures`.
        rivals: the rivals of the result, ours first; one without any figure has no column.
        pairs: tree and operation of each row.
        labels: the first cells of each row.
        head: the first cells of the head.
    """
    ours, *others = rivals
    shown = [name for name in others if any(figures.seconds(*p, name) is not None for p in pairs)]
    rows = []
    for pair, label in zip(pairs, labels):
        texts = []
        for name in shown:
            status = figures.status(*pair, name)
            ratio = ratio_text(figures.ratio(*pair, name, ours))
            texts.append(
                NOTHING
                if status in ("unsupported", "missing")
                else ratio
                if status == "ok"
                else status
            )
        rows.append([*label, figures.time_text(*pair, ours), *texts])
    return table([*head, *(str(rivals[name]["label"]) for name in (ours, *shown))], rows)


def range_text(ratios: Iterable[float | None]) -> str:
    """Return the least and the greatest of the ratios that are not None.

    >>> range_text([12.34, None, 0.8123]), range_text([None]), range_text([2.0])
    ('0.81x to 12.3x', '–', '2x')
    """
    found = [ratio for ratio in ratios if ratio is not None]
    ends = dict.fromkeys(ratio_text(end) for end in (min(found), max(found))) if found else []
    return " to ".join(ends) or NOTHING


def bytes_text(size: float | None) -> str:
    """Return a number of bytes in a readable unit.

    >>> bytes_text(27.25), bytes_text(2048), bytes_text(3 * 2**20)
    ('27.2 B', '2 KiB', '3 MiB')
    """
    if size is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{_three_digits(size)} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def _three_digits(number: float) -> str:
    if abs(number) >= 100:
        return f"{number:.0f}"
    if abs(number) >= 10:
        return f"{number:.1f}"
    text = f"{number:.2f}"
    return text[:-1].removesuffix(".0") if text.endswith("0") else text
