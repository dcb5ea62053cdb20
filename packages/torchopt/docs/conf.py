# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the manual: ``sphinx -W -b html docs OUTPUT``."""

from __future__ import annotations

import re
from typing import Any

import torchopt

project = "torchopt"
author = "the torchopt developers"
copyright = author
release = version = torchopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]

html_theme = "furo"
html_title = f"torchopt {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the texts say it shorter than expanded unions of trees
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
    """Let docstrings be plain text: bars and stars are mathematics, not markup.

    Tables, rows that begin with a bar, stay as they are, in a literal block; so do examples.
    """
    out: list[str] = []
    example = literal = table = False
    indent = 0
    for line in lines:
        blank = not line.strip()
        depth = len(line) - len(line.lstrip())
        example = (example and not blank) or line.lstrip().startswith(">>>")
        literal = literal and (blank or depth > indent)
        if line.lstrip().startswith("|") and not (example or literal):
            if not table:
                out += ["", " " * depth + "::", ""]
            table = True
            out.append("    " + line)
            continue
        if table:
            out.append("")
            table = False
        out.append(line if example or literal else escaped(line))
        if line.rstrip().endswith("::"):
            literal, indent = True, depth
    lines[:] = out


def escaped(line: str) -> str:
    """Return a line whose bars, stars and final underscores outside of backquotes are escaped."""
    text = line.lstrip()
    bullet = line[: len(line) - len(text) + 2] if text.startswith("* ") else ""
    parts = line[len(bullet) :].split("`")
    parts[::2] = [re.sub(r"[|*]|(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts[::2]]
    return bullet + "`".join(parts)


def setup(app: Any) -> None:
    """Run before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", plain_text, priority=100)
