# SPDX-License-Identifier: Apache-2.0
"""Every example in the README, the manual and ``examples/`` runs and prints what it shows.

The ```` ```python ```` blocks with prompts of a Markdown file run in one session and share their
names. The comment ``<!-- needs: torch -->`` before a block skips it where torch is missing.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import re
import runpy
import typing
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import ParamSpec

import optree

PACKAGE = Path(__file__).resolve().parent.parent
PAGES = [PACKAGE / "README.md", *sorted((PACKAGE / "docs").rglob("*.md"))]
EXAMPLES = sorted((PACKAGE / "examples").glob("*.py"))
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>\w+) -->\s*)?^```python\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)

if not PAGES[1:]:
    pytest.skip("the manual is not beside these tests", allow_module_level=True)


def session_of(text: str) -> str:
    """Return only the examples of a page, each at its original line number."""
    kept = ["\n"] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        if block["needs"] and importlib.util.find_spec(block["needs"]) is None:
            continue
        first = text.count("\n", 0, block.start("code"))
        for number, line in enumerate(block["code"].splitlines(keepends=True), first):
            kept[number] = line
    return "".join(kept)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PACKAGE).as_posix())
def test_examples_of_a_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = text.count("```python\n")
    assert len(BLOCK.findall(text)) == blocks, "a block of Python is not closed"
    code = session_of(text)
    if blocks > 0 and not code.strip():
        pytest.skip("every example needs a package that is not installed")
    session = doctest.DocTestParser().get_doctest(code, {}, page.name, str(page), 0)
    said: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=said.append)
    assert results.failed == 0, "".join(said)
    assert (results.attempted > 0) == (blocks > 0)


def test_a_wrong_example_is_found() -> None:
    text = "text\n\n```python\n>>> 1 + 1\n3\n```\n"
    session = doctest.DocTestParser().get_doctest(session_of(text), {}, "page", "page", 0)
    assert session.examples[0].lineno == 3
    assert doctest.DocTestRunner().run(session, out=lambda _: None).failed == 1


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.stem)
def test_example_program(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = re.search(r"Prints::\n\n(.*?)\n\"\"\"", example.read_text(encoding="utf-8"), re.S)
    assert expected is not None, "the docstring ends with what the program prints"
    runpy.run_path(str(example), run_name="__main__")
    lines = [line[4:] for line in expected[1].splitlines()]
    assert capsys.readouterr().out.splitlines() == lines


def _documented() -> set[str]:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    return set(re.findall(r"^\.\. (?:auto\w+|py:data):: ([\w.]+)", text, re.MULTILINE))


@pytest.mark.parametrize(
    "module",
    [
        "optree",
        "optree.dataclasses",
        "optree.functools",
        "optree.pytree",
        "optree.treespec",
        "optree.typing",
    ],
)
def test_the_reference_has_every_public_name(module: str) -> None:
    public: Any = importlib.import_module(module)
    names = set(public.__all__)
    if module == "optree":
        names |= {
            "GLOBAL_NAMESPACE",
            "clear_caches",
            "keystr",
            "tree_combine",
            "tree_leaves_with_path",
        }
        names |= {"tree_map_only", "treespec_dumps", "treespec_loads"}
        names |= {"register_dataclass", "register_static", "tree_all_only", "tree_any_only"}
        names |= {"tree_replace_at", "tree_summary"}
    documented = _documented()
    missing = []
    for name in sorted(names):
        member = getattr(public, name)
        elsewhere = (
            # Names of the standard library are documented there.
            getattr(member, "__module__", "").split(".")[0] != "optree"
            or getattr(dataclasses, name, None) is member
            or isinstance(member, (typing.TypeVar, ParamSpec))
            # Aliases are documented under their name in optree.
            or any(member is getattr(optree, other, None) for other in optree.__all__)
        )
        if module != "optree" and elsewhere:
            continue
        if f"{module}.{name}" not in documented:
            missing.append(name)
    assert missing == []
