# SPDX-License-Identifier: Apache-2.0
"""Every example on a page is run by a test.

The two files `test_documentation.py` run the READMEs of the repository and of both packages, and
every page of the two manuals.  torchopt's `test_recipe.py` runs the recipe of CONTRIBUTING.  Other
pages have no examples in Python.
"""

from __future__ import annotations

import re

from check_links import ROOT, pages

FENCE = re.compile(r"^ *(?:```|~~~)\{?(?:code-block\} )?(py\w*)", re.MULTILINE | re.IGNORECASE)
RUN = re.compile(r"(packages/\w+/)?README\.md|packages/\w+/docs/.+\.md|\.github/CONTRIBUTING\.md")


def test_every_example_is_where_tests_look() -> None:
    found = []
    for page in pages():
        where = page.relative_to(ROOT).as_posix()
        kinds = FENCE.findall(page.read_text(encoding="utf-8"))
        if kinds:
            found.append(where)
            assert RUN.fullmatch(where), where
        assert set(kinds) <= {"python"}, f"{where}: only blocks of `python` are run, found {kinds}"
    assert len(found) > 20


def test_the_suites_look_there() -> None:
    for package in ("optree", "torchopt"):
        tests = ROOT / "packages" / package / "tests" / "test_documentation.py"
        source = tests.read_text(encoding="utf-8")
        assert '"README.md"' in source
        assert 'rglob("*.md")' in source
    recipe = ROOT / "packages" / "torchopt" / "tests" / "optim" / "test_recipe.py"
    assert "CONTRIBUTING.md" in recipe.read_text(encoding="utf-8")
