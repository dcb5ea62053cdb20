# SPDX-License-Identifier: Apache-2.0
"""The Sphinx settings shared by the manuals of both packages: appearance and external links.

Three environment variables give addresses; without them the manuals have no such links or menu:

- ``DOCS_REPOSITORY``: the address of the repository, for the edit link of every page.
- ``DOCS_BRANCH``: the branch that the edit link opens (default: main).
- ``DOCS_VERSIONS``: the versions in the menu, as ``1.0=https://…/1.0/ 0.7=https://…/0.7/``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

__all__ = ["not_a_list", "page_titles", "settings", "versions"]

HERE = Path(__file__).resolve().parent
SIDEBAR = (
    "sidebar/brand.html",
    "versions.html",
    "sidebar/search.html",
    "sidebar/scroll-start.html",
    "sidebar/navigation.html",
    "sidebar/scroll-end.html",
)

# reStructuredText parses "D. P. Kingma" at the start of a line as item D of a list.
ENUMERATOR = re.compile(r"^(\s*)([A-Za-z]|[ivxlcdmIVXLCDM]+)\.(?=\s|$)")


def versions(text: str) -> list[tuple[str, str]]:
    """Return pairs of name and address.

    >>> versions("1.0=https://docs.example/1.0/")
    [('1.0', 'https://docs.example/1.0/')]
    """
    pairs = [item.partition("=") for item in text.split()]
    wrong = [name for name, equals, address in pairs if not (name and equals and address)]
    if wrong:
        raise ValueError(f"DOCS_VERSIONS: expected NAME=ADDRESS, got {wrong[0]!r}")
    return [(name, address) for name, _, address in pairs]


def settings(package: str, release: str) -> dict[str, Any]:
    """Return the settings of Sphinx for one package's manual."""
    repository = os.environ.get("DOCS_REPOSITORY", "").rstrip("/")
    options: dict[str, Any] = {"top_of_page_buttons": ["view", "edit"] if repository else []}
    if repository:
        options["source_repository"] = f"{repository}/"
        options["source_branch"] = os.environ.get("DOCS_BRANCH", "main")
        options["source_directory"] = f"packages/{package}/docs/"
    return {
        "html_theme": "furo",
        "html_theme_options": options,
        "html_title": f"{package} {release}",
        "html_logo": "_static/logo.svg",
        "html_favicon": "_static/logo.svg",
        "html_static_path": ["_static", str(HERE / "static")],
        "html_css_files": ["manual.css"],
        "html_js_files": ["manual.js"],
        "html_sidebars": {"**": list(SIDEBAR)},
        "html_context": {"versions": versions(os.environ.get("DOCS_VERSIONS", ""))},
        "templates_path": [str(HERE / "templates")],
        "html_copy_source": False,
    }


def not_a_list(line: str) -> str:
    r"""Return a line of a docstring, escaped so that it does not begin a lettered list.

    >>> print(not_a_list("    D. P. Kingma, J. Ba, Adam, 2015"))
        D\. P. Kingma, J. Ba, Adam, 2015
    """
    return ENUMERATOR.sub(r"\1\2\\.", line)


def page_titles(docs: Path) -> dict[Path, str]:
    """Return the title of each page of a manual."""
    title = re.compile(r"^# (.+)$", re.MULTILINE)
    found = {}
    for page in sorted(docs.rglob("*.md")):
        match = title.search(page.read_text(encoding="utf-8"))
        if match is None:
            raise ValueError(f"{page.relative_to(docs)}: expected a title, found none")
        found[page] = match[1]
    return found
