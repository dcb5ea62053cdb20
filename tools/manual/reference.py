# SPDX-License-Identifier: Apache-2.0
"""Sphinx hooks that turn docstrings into reference pages: links, types and omissions."""

from __future__ import annotations

import importlib
import re
from typing import Any

from docutils import nodes
from sphinx.domains.python import PyObject
from sphinx.util.nodes import make_refnode

__all__ = [
    "find",
    "plain_first_line",
    "public_bases",
    "references_as_list",
    "setup",
    "short_types",
]

# Base classes that do not inform a reader.
SILENT = frozenset(("object", "ABC", "Described", "Generic", "Protocol"))


def find(dotted: str) -> Any:
    """Return the object named `package.module.name`, or None if there is none.

    >>> find("os.path.join").__name__, find("os.nothing")
    ('join', None)
    """
    parts = dotted.split(".")
    try:
        found: Any = importlib.import_module(parts[0])
        for i, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:i]))
            found = getattr(found, part)
    except (AttributeError, ImportError, ValueError):
        return None
    return found


def link(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Link a name that is exported twice to the place where the manual documents it.

    `torchopt.inner_loop` is described as `torchopt.diff.explicit.inner_loop`.
    """
    target = str(node.get("reftarget", "")).partition("(")[0]
    wanted = find(target) if node.get("refdomain") == "py" and "." in target else None
    if wanted is None:
        return None
    last = target.rpartition(".")[2]
    for name, entry in env.get_domain("py").objects.items():
        if name.rpartition(".")[2] == last and find(name) is wanted:
            place = node["refdoc"], entry.docname, entry.node_id
            return make_refnode(app.builder, *place, text, name)
    return None


def plain_first_line(
    app: Any, what: str, name: str, member: object, options: object, lines: list[str]
) -> None:
    """Put an empty comment before the docstring of a property.

    Napoleon takes the text before a colon in the first line for the type.
    """
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def short_types(
    app: Any, what: str, name: str, member: object, options: object, lines: list[str]
) -> None:
    """Drop the module names in the types of fields: `Callable`, not `collections.abc.Callable`."""
    for i, line in enumerate(lines):
        if line.lstrip().startswith(":vartype"):
            lines[i] = re.sub(r"\b(?:collections\.abc|typing|torch)\.(?=[A-Z])", "", line)


def references_as_list(
    app: Any, what: str, name: str, member: object, options: object, lines: list[str]
) -> None:
    """Turn the references of a docstring into a list if there are several."""
    if "References:" not in lines:
        return
    first = lines.index("References:") + 1
    sections = (i for i, line in enumerate(lines) if i >= first and line[:1].strip())
    last = next(sections, len(lines))
    items = re.split(r"\n\s*\n", "\n".join(lines[first:last]).strip("\n"))
    if len(items) > 1:
        shown = ("    * " + item.strip().replace("\n", "\n  ") for item in items)
        lines[first:last] = ["", *"\n".join(shown).split("\n"), ""]


def public_bases(app: Any, name: str, member: object, options: object, bases: list[type]) -> None:
    """Drop base classes that are private or that every class has."""
    classes = [getattr(base, "__origin__", base) for base in bases]  # without type variables
    shown = [c for c in classes if c.__name__ not in SILENT and not c.__name__.startswith("_")]
    bases[:] = shown or [object]


def without_object(app: Any, tree: Any) -> None:
    """Remove the line "Bases: object"."""
    for paragraph in list(tree.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)


def setup(app: Any) -> None:
    """Connect all of this to Sphinx, after its extensions."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-docstring", plain_first_line, priority=90)
    app.connect("autodoc-process-docstring", references_as_list, priority=150)
    app.connect("autodoc-process-docstring", short_types, priority=900)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("doctree-read", without_object)
    app.connect("missing-reference", link)
