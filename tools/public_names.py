# SPDX-License-Identifier: Apache-2.0
"""Find the public names of both packages, and those that a test file uses.

Public names are those in the `__all__` of a documented module. The tests are parsed, not run. A
test uses an object if its code reads the object under any of its names, or reads it from its module
by `getattr` with the keys of a table. Annotations and imports do not count.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "defaults", "object_of", "public_names", "unused", "used_by"]

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\.\. auto\w+:: ([\w.]+)", re.MULTILINE)
PACKAGES = ("optree", "torchopt")


def attribute(found: Any, dotted: str) -> Any:
    """Return the object `a.b.c` below a module, or None; modules are imported on demand."""
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
    """Return whether an attribute exists; one whose library is not installed does not count."""
    try:
        return hasattr(found, name)
    except ImportError:
        return False


def object_of(dotted: str) -> Any:
    """Return the object with a dotted name in one of the packages, or None."""
    package, _, rest = dotted.partition(".")
    return attribute(importlib.import_module(package), rest) if package in PACKAGES else None


def dotted_name(node: ast.AST) -> str:
    """Return `a.b.c` for names and their attributes, and "" for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{base}.{node.attr}" if (base := dotted_name(node.value)) else ""
    return ""


class Reader(ast.NodeVisitor):
    """Collects the objects of the packages that a test file uses, by identity."""

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
        """Treat `attrs = optree.integrations.attrs` like an import."""
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
        """Record a use; `Tag.SYMMETRIC` uses `Tag` as well."""
        while dotted:
            self.used.append(self.meant(dotted))
            dotted = dotted.rpartition(".")[0]

    def found(self) -> Iterator[Any]:
        """Yield the objects used by name, and those that tables of names select from modules."""
        yield from self.used
        for module in filter(inspect.ismodule, self.looked_in):
            yield from (getattr(module, text) for text in self.texts if text in dir(module))


def used_by(source: str) -> list[Any]:
    """Return the objects used by the source of a test file."""
    reader = Reader()
    reader.visit(ast.parse(source))
    return [found for found in reader.found() if found is not None]


def public_names(package: str) -> set[str]:
    """Return the names that the manual documents, including the `__all__` of documented modules.

    A documented module without `__all__` is only a text.
    """
    pages = (ROOT / "packages" / package / "docs").rglob("*.md")
    names = {name for page in pages for name in DIRECTIVE.findall(page.read_text())} | {package}
    modules = {name for name in names if inspect.ismodule(object_of(name))}
    return names - modules | {
        f"{m}.{n}" for m in modules for n in getattr(object_of(m), "__all__", ())
    }


def is_used(found: Any, used: dict[int, Any]) -> bool:
    """Return whether a function or class is used; an abstract class may be used by a subclass."""
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


def is_number(value: Any) -> bool:
    """Return whether a value is a number, a bool, or a tuple of them."""
    if isinstance(value, tuple):
        return len(value) > 0 and all(map(is_number, value))
    return isinstance(value, (int, float))


def defaults(package: str) -> dict[str, str]:
    """Return the numeric defaults, `a=1, b=0.5`, by the alphabetically first public name.

    Defaults of the standard library's dataclasses are left out: they differ between versions.
    """
    found: dict[str, str] = {}
    seen = set()
    for name in sorted(public_names(package)):
        member = object_of(name)
        ours = str(getattr(member, "__module__", "")).split(".")[0] == package
        if not ours or ".dataclasses." in name or id(member) in seen or not callable(member):
            continue
        seen.add(id(member))
        with contextlib.suppress(TypeError, ValueError):  # some C functions have none
            parameters = inspect.signature(member).parameters.values()
            if numbers := [f"{p.name}={p.default}" for p in parameters if is_number(p.default)]:
                found[name] = ", ".join(numbers)
    return found


if __name__ == "__main__":  # write the table for the tests
    table = ROOT / "tools" / "tests" / "public_defaults.json"
    every = {package: defaults(package) for package in PACKAGES}
    table.write_text(json.dumps(every, indent=1) + "\n")
