# SPDX-License-Identifier: Apache-2.0
"""In the manuals, titles are unique, initials start no list, and addresses become links."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import manual

PACKAGES = Path(__file__).resolve().parents[2] / "packages"


@pytest.mark.parametrize("package", ["optree", "torchopt"])
def test_titles_are_unique(package: str) -> None:
    titles = sorted(manual.page_titles(PACKAGES / package / "docs").values())
    assert len(titles) > 10
    assert titles == sorted(set(titles))


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("D. P. Kingma, J. Ba", r"D\. P. Kingma, J. Ba"),
        ("    N. J. Higham", r"    N\. J. Higham"),
        ("X.-L. Li", "X.-L. Li"),
        ("A step.", "A step."),
        ("i. e. the first", r"i\. e. the first"),
        ("* item", "* item"),
    ],
)
def test_a_name_at_the_start_of_a_line_is_not_an_item(line: str, shown: str) -> None:
    assert manual.not_a_list(line) == shown


def test_without_an_address_there_is_not_a_link(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DOCS_REPOSITORY", "DOCS_BRANCH", "DOCS_VERSIONS"):
        monkeypatch.delenv(name, raising=False)
    found = manual.settings("optree", "1.0")
    assert "source_repository" not in found["html_theme_options"]
    assert found["html_context"]["versions"] == []


def test_addresses_make_an_edit_link_and_a_menu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCS_REPOSITORY", "https://github.com/some/where")
    monkeypatch.setenv("DOCS_VERSIONS", "1.0=https://a.example/1.0/ 0.7=https://a.example/0.7/")
    found = manual.settings("optree", "1.0")
    assert found["html_theme_options"]["source_repository"] == "https://github.com/some/where/"
    assert found["html_theme_options"]["source_directory"] == "packages/optree/docs/"
    assert [name for name, _ in found["html_context"]["versions"]] == ["1.0", "0.7"]


def test_a_version_without_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected NAME=ADDRESS, got '1\.0'"):
        manual.versions("1.0")


def test_several_references_are_a_list() -> None:
    pytest.importorskip("sphinx")
    reference = importlib.import_module("manual.reference")
    lines = [
        "A step.",
        "",
        "References:",
        "    A, 2015,",
        "    page 1.",
        "",
        "    B, 2016.",
        "",
        "Note:",
        "    x",
    ]
    shown = ["", "    * A, 2015,", "      page 1.", "    * B, 2016.", ""]
    wanted = [*lines[:3], *shown, *lines[8:]]
    reference.references_as_list(None, "function", "f", None, None, lines)
    assert lines == wanted
    reference.references_as_list(
        None, "function", "f", None, None, one := ["References:", "    A."]
    )
    assert one == ["References:", "    A."]


def test_the_sentence_of_a_property_stays_whole() -> None:
    docstring = pytest.importorskip("sphinx.ext.napoleon.docstring")
    napoleon = pytest.importorskip("sphinx.ext.napoleon")
    lines = ["The path without types: a tuple.", "", "More."]
    reference = importlib.import_module("manual.reference")
    reference.plain_first_line(None, "property", "x.path", None, None, lines)
    shown = str(docstring.GoogleDocstring(lines, napoleon.Config(), what="property"))
    assert shown == "..\n\nThe path without types: a tuple.\n\nMore."
