# SPDX-License-Identifier: Apache-2.0
"""The configuration of Sphinx; build the manual with ``sphinx-build -W -b html docs OUTPUT``."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torchopt

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))
import manual.reference
from torchopt.index import OPTIMIZERS

project = "torchopt"
author = "the torchopt developers"
copyright = author
release = version = torchopt.__version__

extensions = [
    *("myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"),
    "sphinx-mathjax-offline",  # MathJax and its fonts are copied next to the pages: no network
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
default_role = "py:obj"  # `name` in a docstring: code, and a link where there is one
nitpicky = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]

globals().update(manual.settings(project, release))

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # expanded unions of trees are longer than the texts about them
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = True
napoleon_use_ivar = True
napoleon_custom_sections = [("Subclass keywords", "params_style")]


def plain_text(
    app: Any, what: str, name: str, member: object, options: object, lines: list[str]
) -> None:
    """Treat docstrings as plain text: bars and stars are mathematics, not markup.

    Markdown tables become tables, and indented formulas become literal blocks. Literal blocks and
    examples do not change.
    """
    out: list[str] = []
    example = literal = False
    indent = 0
    above = ""
    rows = iter(range(len(lines)))
    for number in rows:
        line = lines[number]
        blank = not line.strip()
        depth = len(line) - len(line.lstrip())
        example = (example and not blank) or line.lstrip().startswith(">>>")
        literal = literal and (blank or depth > indent)
        if depth and TEXT.match(above) and not (lines[number - 1].strip() or example or literal):
            out += ["::", ""]
            literal, indent = True, 0
        above = above if blank else line
        if example or literal:
            out.append(line)
        elif RULE.match("".join(lines[number + 1 : number + 2])):
            table = list(itertools.takewhile(lambda row: row.lstrip()[:1] == "|", lines[number:]))
            out += ["", *list_table(table, " " * depth), ""]
            for _ in table[1:]:
                next(rows)
        else:
            out.append(manual.not_a_list(escaped(line)))
        if line.rstrip().endswith("::"):
            literal, indent = True, depth
    lines[:] = out


# A paragraph at the margin: no section such as "Args:", no directive, item of a list or table.
TEXT = re.compile(r"(?![A-Z]\w*(?: \w+)?:$|\.\. |\* |\d+\. |\|)\S")
RULE = re.compile(r"\s*\|(?:-+\|)+$")


def list_table(rows: list[str], pad: str) -> list[str]:
    """Return the rows of a Markdown table as a directive."""
    out = [f"{pad}.. list-table::", f"{pad}   :header-rows: 1", ""]
    for row in (rows[0], *rows[2:]):
        cells = [escaped(cell.strip()) for cell in row.strip().strip("|").split("|")]
        bullets = ("* -", *["  -"] * (len(cells) - 1))
        out += [f"{pad}   {bullet} {cell}" for bullet, cell in zip(bullets, cells)]
    return out


def without_repetition(
    app: Any, what: str, name: str, member: object, options: object, lines: list[str]
) -> None:
    """Leave equations and arguments of a class of optimizers to the page of its function."""
    function = FUNCTIONS.get(name.rpartition(".")[2])
    if what == "class" and function is not None:
        text = f"For equation, arguments and references see `torchopt.alias.{function}`."
        lines[1:] = [text]


def without_base(app: Any, name: str, member: object, options: object, bases: list[type]) -> None:
    """Drop the base class of a class of optimizers, which its sentence names."""
    if name.rpartition(".")[2] in FUNCTIONS:
        bases[:] = [object]


FUNCTIONS = {
    f"{prefix}{cls}": function for function, cls in OPTIMIZERS.items() for prefix in ("", "Meta")
}


def is_field_of_a_tuple(
    app: Any, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leave the fields of named tuples to the description of the class."""
    return True if isinstance(member, type(Point.x)) else None


class Point(NamedTuple):
    """Any named tuple: all fields are of one class."""

    x: int


def escaped(line: str) -> str:
    """Return a line in which bars, stars and final underscores outside backquotes are escaped.

    An attribute such as `.grad` is formatted as code, not as a link to a function of that name.
    """
    text = line.lstrip()
    bullet = line[: len(line) - len(text) + 2] if text.startswith("* ") else ""
    parts = re.split("(``?)", line[len(bullet) :])  # text, quotes, code, quotes, text ...
    for i in range(0, len(parts), 4):
        parts[i] = re.sub(r"[|*]|(?<=\w)_(?!\w)", r"\\\g<0>", parts[i])
    for i in range(2, len(parts), 4):
        if parts[i].startswith(".") and parts[i - 1] == "`":
            parts[i] = f"`{parts[i]}`"
    return bullet + "".join(parts)


def setup(app: Any) -> None:
    """Connect the handlers; `plain_text` runs before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", without_repetition, priority=50)
    app.connect("autodoc-process-docstring", plain_text, priority=100)
    app.connect("autodoc-process-bases", without_base)
    app.connect("autodoc-skip-member", is_field_of_a_tuple)
    manual.reference.setup(app)
