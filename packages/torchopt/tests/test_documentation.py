# SPDX-License-Identifier: Apache-2.0
"""Every example in the READMEs, the manual and the tutorials runs and prints the stated output.

A Markdown file is one program: its blocks of ```` ```python ```` run in order and share names.
A block of ```` ```text ```` right after one is what it prints; `...` in it stands for anything.
The comment ``<!-- needs: graphviz -->`` before a block leaves it out where that is not installed.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import torchopt

PACKAGE = Path(__file__).resolve().parent.parent
ROOT = PACKAGE.parent.parent
DOCS = PACKAGE / "docs"
PAGES = sorted(path for path in [PACKAGE / "README.md", *DOCS.rglob("*.md")] if path.is_file())
BLOCK = re.compile(
    r"(?:<!-- needs: (?P<needs>\w+) -->\s*)?^```python\n(?P<code>.*?)^```$"
    r"(?:\n\n^```text\n(?P<printed>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

if not DOCS.is_dir():
    pytest.skip("the manual is not beside these tests", allow_module_level=True)

if (ROOT / "packages").is_dir():
    PAGES.append(ROOT / "README.md")


def missing_libraries(text: str) -> list[str]:
    """Return the missing libraries that every block of a page needs."""
    needed = [block["needs"] for block in BLOCK.finditer(text)]
    missing = [name for name in needed if name and importlib.util.find_spec(name) is None]
    return sorted(set(missing)) if needed and len(missing) == len(needed) else []


def run_page(page: Path, text: str) -> list[str]:
    """Run the blocks of a page and return descriptions of all differences in the output."""
    names: dict[str, Any] = {"__name__": "page"}
    wrong = []
    for block in BLOCK.finditer(text):
        if block["needs"] and importlib.util.find_spec(block["needs"]) is None:
            continue
        line = text.count("\n", 0, block.start("code"))
        printed = io.StringIO()
        code = compile("\n" * line + block["code"], str(page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if block["printed"] is not None:
            found, expected = printed.getvalue(), block["printed"]
            if not doctest.OutputChecker().check_output(expected, found, FLAGS):
                wrong.append(f"{page.name}:{line + 1}: expected\n{expected}printed\n{found}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_of_a_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = text.count("```python\n")
    assert len(BLOCK.findall(text)) == blocks, "a block of Python is not closed"
    torch.manual_seed(0)
    if missing := missing_libraries(text):
        pytest.skip(f"every block needs {', '.join(missing)}, which is not installed")
    assert run_page(page, text) == []


def test_a_page_is_skipped_only_if_nothing_of_it_runs() -> None:
    block = "```python\nx = 1\n```\n"
    needs = f"<!-- needs: no_such_library -->\n\n{block}"
    assert missing_libraries(needs) == ["no_such_library"]
    assert missing_libraries(needs + block) == missing_libraries("text") == []
    assert missing_libraries(f"<!-- needs: torch -->\n\n{block}") == []


def test_a_wrong_example_is_found() -> None:
    text = "text\n\n```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n"
    assert run_page(Path("page.md"), text) == ["page.md:4: expected\n3\nprinted\n2\n"]


def documented_modules() -> set[str]:
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    return set(re.findall(r"^\.\. automodule:: ([\w.]+)", text, re.MULTILINE))


def test_the_reference_has_every_public_module() -> None:
    """Modules directly in torchopt, and families of `torchopt.diff`, are public."""
    import torchopt.diff

    parents = [(torchopt.__path__, "torchopt."), (torchopt.diff.__path__, "torchopt.diff.")]
    public = {
        found.name
        for path, prefix in parents
        for found in pkgutil.iter_modules(path, prefix)
        if not found.name.rpartition(".")[2].startswith("_")
    }
    # Parts of the documented modules, and names that only repeat others.
    internal = {
        *("tree", "tree_function", "version", "diff", "kernels", "precision", "torch_internals"),
        *("documented", "index", "lazy", "shown"),
        *(
            f"diff.{name}"
            for name in (
                *("attention", "call_state", "closure", "hooks", "places", "problem", "rebuild"),
                *("recorder", "recurrence", "sealed", "surroundings", "twice_differentiable"),
            )
        ),
    }
    internal = {f"torchopt.{name}" for name in internal}
    assert public - internal - documented_modules() == set()


def documented_members(module: str) -> list[str]:
    """Return the names of a module that pages list one by one."""
    text = "".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md"))
    kinds = r"auto(?:function|class|exception)|py:(?:data|function)"
    entry = rf"^\.\. (?:{kinds}):: {re.escape(module)}\.(\w+)(?:\(\))?$"
    return re.findall(entry, text, re.MULTILINE)


# The modules on several pages, and their names that are documented in other modules.
SEVERAL_PAGES: dict[str, tuple[str, ...]] = {
    "alias": (),
    "diff.implicit": ("ImplicitMetaGradientModule",),
    "diff.zero_order": ("Estimator", "GradientEstimate", "ZeroOrderGradientModule"),
    "distributed": (),
    "linear_solve": (),
    "nn": (),
    "solvers": (),
    "transform": (),
}


@pytest.mark.parametrize("name", SEVERAL_PAGES)
def test_modules_on_several_pages_are_documented_once_and_in_full(name: str) -> None:
    module = importlib.import_module(f"torchopt.{name}")
    expected = {*module.__all__} - {*SEVERAL_PAGES[name]}
    assert sorted(documented_members(module.__name__)) == sorted(expected)


def resolve(dotted: str) -> Any:
    """Return the module or object of a dotted name of torchopt."""
    parts = dotted.split(".")
    found: Any = torchopt
    for i, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    names = set(re.findall(r"`[^`\n]*?\b(torchopt(?:\.[A-Za-z]\w*)+)", text))
    for name in sorted(names):
        assert resolve(name) is not None, name


@pytest.mark.parametrize("name", sorted(documented_modules()))
def test_a_documented_module_says_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    own = [x for x in vars(module).values() if getattr(x, "__module__", None) == name]
    assert hasattr(module, "__all__") or not own  # a package may consist of a text
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public)
