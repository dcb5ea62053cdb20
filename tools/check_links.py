# SPDX-License-Identifier: Apache-2.0
"""Check the links of every Markdown file without a network.

* A relative link leads to a file or folder of the repository, spelled in the same case.
* A link to a heading (`#name`, `page.md#name`) leads to an existing one, named as on GitHub.
* A package's README has no image with a relative path: a package index would not show it.
* An external link is an `https` address with a host, and no part of it is a placeholder.

``python3 tools/dev.py links`` checks whether the addresses respond; it needs a network.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".venv", ".nox", ".git", ".rivals", "build", "third_party", "node_modules", "wheelhouse"}

FENCE = re.compile(r"^(`{3,}|~{3,}).*?^\1[`~]*$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
INLINE = re.compile(
    r"(?P<picture>!?)\[(?:[^\[\]]|\[[^\]]*\])*\]\((?P<target>[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)"
)
BARE = re.compile(r"https?://[^\s<>\"'`\])]+")
HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.MULTILINE)
LABEL = re.compile(r"^\(([\w-]+)\)=$|<a (?:id|name)=\"([^\"]+)\"", re.MULTILINE)
HOST = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}")
PLACEHOLDERS = ("example.com", "example.org", "TODO", "OWNER", "your-", "localhost")


def _blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def prose(text: str) -> str:
    """Return the text with its fenced and inline code replaced by spaces of the same length."""
    return CODE.sub(_blank, FENCE.sub(_blank, text))


def anchors(text: str) -> set[str]:
    """Return the names of the headings of a page and of its explicit anchors."""
    names: set[str] = set()
    for found in HEADING.finditer(FENCE.sub(_blank, text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", found[1]).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        unique, number = name, 0
        while unique in names:
            number += 1
            unique = f"{name}-{number}"
        names.add(unique)
    return names | {a or b for a, b in LABEL.findall(text)}


def _exists(path: Path) -> bool:
    """Return whether a path exists with this spelling: some file systems ignore case."""
    if not path.exists():
        return False
    return path.name in ("", ".", "..") or path.name in {p.name for p in path.parent.iterdir()}


def wrong_address(address: str) -> str | None:
    """Return what is wrong with an external link, or None."""
    parts = urlsplit(address)
    if parts.scheme != "https":
        return f"expected https, got {parts.scheme}"
    if not HOST.fullmatch(parts.netloc.lower()):
        return f"expected a host with a domain, got {parts.netloc!r}"
    for placeholder in PLACEHOLDERS:
        if placeholder in address:
            return f"{placeholder!r} is a placeholder for an address"
    return None


def wrong_target(page: Path, target: str, picture: bool, root: Path) -> str | None:
    """Return what is wrong with a link inside the repository, or None."""
    name, _, heading = target.partition("#")
    path = (page.parent / unquote(name)).resolve() if name else page
    if not path.is_relative_to(root):
        return "it leads outside the repository"
    if not _exists(path):
        return f"no such file: {path.relative_to(root)}"
    in_package = page.name == "README.md" and page.parent.parent.name == "packages"
    if picture and in_package:
        return "a package index shows this page without the files beside it"
    if heading and heading not in anchors(path.read_text(encoding="utf-8")):
        return f"no heading {heading!r} in {path.relative_to(root)}"
    return None


def problems(page: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield a line for every broken link of a page."""
    text = prose(page.read_text(encoding="utf-8"))
    found: list[tuple[int, str, str | None]] = []
    for link in INLINE.finditer(text):
        target = link["target"]
        if urlsplit(target).scheme:
            continue
        wrong = wrong_target(page, target, bool(link["picture"]), root)
        found.append((link.start(), target, wrong))
    for address in BARE.finditer(text):
        whole = address[0].rstrip(".,;:")
        found.append((address.start(), whole, wrong_address(whole)))
    for position, target, wrong in sorted(found):
        if wrong is not None:
            line = text.count("\n", 0, position) + 1
            yield f"{page.relative_to(root)}:{line}: {target}: {wrong}"


def pages(root: Path = ROOT) -> list[Path]:
    """Return the Markdown files of the repository."""
    found: list[Path] = []
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in SKIPPED]
        found += [Path(folder) / name for name in files if name.endswith(".md")]
    return sorted(found)


def main() -> int:
    """Print the broken links and return the exit status."""
    checked = pages()
    wrong = [line for page in checked for line in problems(page)]
    for line in wrong:
        print(line, file=sys.stderr)
    print(
        f"{len(wrong)} links of {len(checked)} pages are broken"
        if wrong
        else f"The links of {len(checked)} pages are valid."
    )
    return 1 if wrong or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
