# SPDX-License-Identifier: Apache-2.0
"""Broken links are reported, valid links are not."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_links as links


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with two pages, a picture and a package."""
    (tmp_path / "packages" / "tree").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "plot.png").write_bytes(b"")
    (tmp_path / "docs" / "other.md").write_text(
        "# A `heading`, with: marks\n\n## Twice\n\n## Twice\n"
    )
    return tmp_path


def found_in(root: Path, text: str, name: str = "README.md") -> list[str]:
    page = root / name
    page.write_text(text, encoding="utf-8")
    return list(links.problems(page, root))


@pytest.mark.parametrize(
    "text",
    [
        "[a](docs/other.md)",
        "[a](docs)",
        "[a](docs/other.md#a-heading-with-marks)",
        "[a](docs/other.md#twice-1)",
        "![a [b] c](docs/plot.png)",
        "# Here I am\n\n[a](#here-i-am)",
        "(mark)=\n\n[a](#mark)",
        "[paper](https://arxiv.org/abs/1803.09050), <https://a-b.org/x_(y)>.",
        "```\n[a](nowhere.md)\n```\n\nand `[b](nowhere.md)` and ``c` [d](nowhere.md)``",
    ],
)
def test_links_that_hold(root: Path, text: str) -> None:
    assert found_in(root, text) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[a](nowhere.md)", "README.md:1: nowhere.md: no such file: nowhere.md"),
        ("\n\n[a](docs/Other.md)", "README.md:3: docs/Other.md: no such file: docs/Other.md"),
        ("[a](docs/other.md#b)", "docs/other.md#b: no heading 'b' in docs/other.md"),
        ("[a](docs/other.md#twice-2)", "no heading 'twice-2'"),
        ("[a](#nowhere)", "README.md:1: #nowhere: no heading 'nowhere' in README.md"),
        ("[a](../outside.md)", "it leads outside the repository"),
        ("[a](http://arxiv.org/abs/1)", "expected https, got http"),
        ("https://arxiv/abs/1", "expected a host with a domain, got 'arxiv'"),
        ("see https://github.com/OWNER/x.", "https://github.com/OWNER/x: 'OWNER' is a placeholder"),
    ],
)
def test_links_that_lead_nowhere(root: Path, text: str, wrong: str) -> None:
    (line,) = found_in(root, text)
    assert wrong in line


def test_the_readme_of_a_package_has_no_relative_picture(root: Path) -> None:
    (root / "packages" / "tree" / "plot.png").write_bytes(b"")
    (line,) = found_in(root, "![plot](plot.png)", "packages/tree/README.md")
    assert "a package index shows this page" in line


def test_the_links_of_this_repository_hold() -> None:
    pages = links.pages()
    assert links.ROOT / "README.md" in pages
    assert [line for page in pages for line in links.problems(page)] == []
