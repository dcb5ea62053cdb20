# SPDX-License-Identifier: Apache-2.0
"""Every public function and class of both packages is used by a test.

Public is what the `__all__` of a documented module lists. The tests are read, not run: a name is
used where a test's code, annotations and imports left out, reads an object of the package under
whichever of its names, or reads it from its module by `getattr` and the keys of a table.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
DIRECTIVE = re.compile(r"^\.\. auto\w+:: ([\w.]+)", re.MULTILINE)
FOUND_BY_NAME = ("optree", "torchopt")


def attribute(found: Any, dotted: str) -> Any:
    """Return what `a.b.c` stands for below a module, or None; modules are imported by need."""
    for name in dotted.split(".") if dotted else ():
        if inspect.ismodule(found) and not hasattr_quietly(found, name):
            try:
                importlib.import_module(f"{found.__name__}.{name}")
            except ImportError:
                return None
        if not hasattr_quietly(found, name):
            return None
        found = getattr(found, name)
    return found


def hasattr_quietly(found: Any, name: str) -> bool:
    """Return whether there is an attribute; one whose library is not installed is none."""
    try:
        return hasattr(found, name)
    except ImportError:
        return False


def object_of(dotted: str) -> Any:
    """Return what a dotted name of one of the packages stands for, or None."""
    package, _, rest = dotted.partition(".")
    return attribute(importlib.import_module(package), rest) if package in FOUND_BY_NAME else None


def dotted_name(node: ast.AST) -> str:
    """Return `a.b.c` for names and their attributes, an empty text for another expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{base}.{node.attr}" if (base := dotted_name(node.value)) else ""
    return ""


class Reader(ast.NodeVisitor):
    """Collects what a file of tests uses: objects of the packages, by identity."""

    def __init__(self) -> None:
        self.bound: dict[str, str] = {}
        self.used: list[Any] = []
        self.looked_in: list[Any] = []
        self.texts: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self.bound[name.asname or name.name.partition(".")[0]] = (
                name.name if name.asname else name.name.partition(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for name in node.names:
            self.bound[name.asname or name.name] = f"{node.module}.{name.name}"

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults, *node.body):
            if part is not None:
                self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        """`attrs = optree.integrations.attrs` is an import by another name."""
        value = dotted_name(node.value)
        if isinstance(node.targets[0], ast.Name) and inspect.ismodule(self.meant(value)):
            first, _, rest = value.partition(".")
            self.bound[node.targets[0].id] = ".".join(filter(None, (self.bound[first], rest)))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.read(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted := dotted_name(node):
            self.read(dotted)
        else:
            self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.texts.add(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        if dotted_name(node.func) == "getattr" and not isinstance(node.args[1], ast.Constant):
            self.looked_in.append(self.meant(dotted_name(node.args[0])))
        self.generic_visit(node)

    def meant(self, dotted: str) -> Any:
        first, _, rest = dotted.partition(".")
        full = ".".join(filter(None, (self.bound.get(first, ""), rest)))
        return object_of(full) if first in self.bound else None

    def read(self, dotted: str) -> None:
        """Note what is read: `Tag.SYMMETRIC` reads `Tag`, too."""
        while dotted:
            self.used.append(self.meant(dotted))
            dotted = dotted.rpartition(".")[0]

    def found(self) -> Iterator[Any]:
        """Yield what was read by name, and what tables of names have of modules."""
        yield from self.used
        for module in filter(inspect.ismodule, self.looked_in):
            yield from (getattr(module, text) for text in self.texts if text in dir(module))


def used_by(source: str) -> list[Any]:
    """Return the objects that the text of a test file uses."""
    reader = Reader()
    reader.visit(ast.parse(source))
    return [found for found in reader.found() if found is not None]


def public_names(package: str) -> set[str]:
    """Return what the manual documents by name, and the `__all__` of what it documents whole."""
    pages = (ROOT / "packages" / package / "docs").rglob("*.md")
    names = {name for page in pages for name in DIRECTIVE.findall(page.read_text())} | {package}
    modules = {name for name in names if inspect.ismodule(object_of(name))}
    return names - modules | {f"{m}.{n}" for m in modules for n in object_of(m).__all__}


def is_used(found: Any, used: dict[int, Any]) -> bool:
    """Return whether a function or class is used; an abstract class is by a subclass."""
    if id(found) in used:
        return True
    below = type.__subclasses__(found) if inspect.isabstract(found) else []
    return any(is_used(each, used) for each in below)


def unused(package: str, used: dict[int, Any]) -> list[str]:
    """Return the public functions and classes of a package that no test uses."""
    missing = set()
    for name in public_names(package):
        member = object_of(name)
        ours = str(getattr(member, "__module__", "")).split(".")[0] == package
        protocol = getattr(member, "_is_protocol", False)
        if ours and inspect.isroutine(member) | isinstance(member, type) and not protocol:
            missing |= set() if is_used(member, used) else {name}
    return sorted(missing)


@pytest.mark.parametrize("package", FOUND_BY_NAME)
def test_every_public_function_and_class_is_used_by_a_test(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = ROOT / "packages" / package / "tests"
    used = [found for path in tests.rglob("*.py") for found in used_by(path.read_text())]
    if package == "torchopt":  # the table of optimizers is read from the index
        monkeypatch.syspath_prepend(str(tests))
        rows = importlib.import_module("optimizers").ROWS.values()
        used += [made for row in rows for made in (row.functional, row.classic, row.meta)]
    assert len(public_names(package)) > 100
    assert unused(package, {id(found): found for found in used}) == []


def test_what_counts_as_use() -> None:
    import optree

    def uses(source: str) -> bool:
        return any(found is optree.tree_map for found in used_by(source))

    assert uses("import optree\noptree.tree_map(f, t)")
    assert uses("import optree.pytree as p\ndef test(): return p.map(f, t)")
    assert uses("from optree import tree_map as m\nTABLE = {'map': m}")
    assert uses("import optree\nfor name in ['tree_map']: getattr(optree, name)(f, t)")
    assert not uses("from optree import tree_map")
    assert not uses("import optree\nTABLE = {'tree_map': 1}")
    assert not uses("import optree\ndef test(f: optree.tree_map) -> optree.tree_map: ...")
    assert not uses("tree_map = print\ntree_map(1)")
