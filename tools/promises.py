# SPDX-License-Identifier: Apache-2.0
"""Find the sentences of both manuals that promise something without exception.

Such a sentence contains "always", "never", "every", "exact", "exactly" or "silently". The texts are
the READMEs, the pages of the manuals without their code and generated tables, and the docstrings
that the pages of the reference show. ``tools/tests/test_promises.py`` names the tests of the
sentences.

``python tools/promises.py`` prints the sentences, each with its place.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from public_names import PACKAGES, ROOT, object_of, public_names

__all__ = ["ABSOLUTE", "of_docstring", "of_page", "promises"]

ABSOLUTE = re.compile(r"\b(always|never|every|exact|exactly|silently)\b", re.IGNORECASE)
CODE_OR_TABLE = re.compile(
    r"^(```.*?^```|---\n.*?^---)$|<!-- (bench|optimizers):begin.*?<!-- \2:end -->",
    re.DOTALL | re.MULTILINE,
)
# Code, the name of an argument before its description, and names of papers are no promises.
QUOTED = re.compile(r"``[^`]*``|`[^`]*`|^ +\w+:|^References:\n(?: .*\n?|\n)+", re.MULTILINE)
EXAMPLE = re.compile(r"^ *(?:>>>|\.\.\.).*\n(?: *\S.*\n)*", re.MULTILINE)
END = re.compile(r"(?<=[.:;!?])\s+|\n\s*\n|\n(?=\s*[*|])")


def of_page(text: str) -> list[str]:
    r"""Return the promises of a Markdown page, a line each.

    >>> of_page("It never fails.\\n`never` is a name.\\n")
    ['It never fails.']
    """
    lines = CODE_OR_TABLE.sub("", text).splitlines()
    return [line for line in lines if ABSOLUTE.search(re.sub(r"`[^`]*`", "", line))]


def of_docstring(text: str) -> list[str]:
    r"""Return the promises of a docstring, a sentence each.

    >>> of_docstring("Return x. It is never\\n    zero.\\n\\nExample:\\n    >>> every(x)\\n")
    ['It is never zero.']
    """
    text = EXAMPLE.sub("", inspect.cleandoc(text) + "\n")
    sentences = [" ".join(s.split()) for s in END.split(QUOTED.sub(_blanked, text))]
    return [s for s in sentences if ABSOLUTE.search(re.sub("``?[^`]*``?", "", s))]


def _blanked(match: re.Match[str]) -> str:
    """Keep quoted code for the reader, without the words that would count."""
    return match[0] if match[0].startswith("`") else "\n\n"


def documented(found: Any, package: str) -> Iterator[str]:
    """Yield the docstrings that the reference shows for an object of a package."""
    ours = str(getattr(found, "__module__", "")).split(".")[0] == package
    if inspect.ismodule(found) or not ours:
        return
    yield inspect.getdoc(found) or ""
    for name, member in vars(found).items() if inspect.isclass(found) else ():
        described = callable(member) or isinstance(member, (property, classmethod, staticmethod))
        if described and not name.startswith("_"):
            yield inspect.getdoc(member) or ""


def modules(package: str) -> Iterator[str]:
    """Yield the docstrings of the modules that the pages of the reference name."""
    pages = (ROOT / "packages" / package / "docs").rglob("*.md")
    named = {name for page in pages for name in re.findall(r"automodule:: (\S+)", page.read_text())}
    for name in sorted(named):
        found = object_of(name)
        yield ast.get_docstring(ast.parse(Path(found.__file__).read_text())) or ""


def promises() -> dict[str, set[str]]:
    """Return the promises, by the file or the package whose docstrings contain them."""
    texts: dict[str, set[str]] = {"README.md": set(of_page((ROOT / "README.md").read_text()))}
    for package in PACKAGES:
        folder = ROOT / "packages" / package
        for page in (folder / "README.md", *sorted((folder / "docs").rglob("*.md"))):
            texts[page.relative_to(ROOT).as_posix()] = set(of_page(page.read_text()))
        found = [object_of(name) for name in sorted(public_names(package))]
        shown = {text for each in found for text in documented(each, package)}
        said = {s for text in (*shown, *modules(package)) for s in of_docstring(text)}
        texts[f"docstrings of {package}"] = said
    return texts


if __name__ == "__main__":
    for place, sentences in promises().items():
        for sentence in sorted(sentences):
            print(f"{place} | {sentence}")
