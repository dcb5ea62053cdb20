# SPDX-License-Identifier: Apache-2.0
"""Find the public names of both packages, and those that a test file calls.

Public names are those in the `__all__` of a documented module. The tests are parsed, not run. A
test calls an object if its code calls the object under any of its names, derives a class from it,
decorates with it, hands it to a function that may call it, or calls a variable to which a table
with the object was assigned. An object that is only read, compared or looked at does not count, nor
do annotations and imports.
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

__all__ = ["PACKAGES", "called_by", "defaults", "object_of", "public_names", "uncalled"]

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


# Functions that look at what they are given, or only store it.
LOOKING = re.compile(
    "dict|dumps|enumerate|frozenset|get_type_hints|getattr|getsource|hasattr|id|isinstance|"
    "issubclass|len|list|namedtuple|param|parametrize|partial|print|repr|set|setattr|signature|"
    "sorted|str|tuple|type|zip"
)


def read_in(node: ast.AST | None) -> list[str]:
    """Return the longest dotted names that an expression reads."""
    if node is None:
        return []
    if dotted := dotted_name(node):
        return [dotted]
    return [name for child in ast.iter_child_nodes(node) for name in read_in(child)]


class Reader(ast.NodeVisitor):
    """Collects the objects of the packages that a test file calls.

    Attributes:
        called: The dotted names that are called, those of variables included.
        values: The dotted names in the expressions that a variable takes its value from.
    """

    def __init__(self) -> None:
        self.bound: dict[str, str] = {}
        self.called: list[str] = []
        self.values: dict[str, list[str]] = {}
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

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.called += [name for base in node.bases for name in read_in(base)]
        self.called += filter(None, map(dotted_name, node.decorator_list))
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.called += filter(None, map(dotted_name, node.decorator_list))
        for call in node.decorator_list:
            self.take_parameters(node.name, call)
        for part in (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults, *node.body):
            if part is not None:
                self.visit(part)

    def take_parameters(self, name: str, node: ast.expr) -> None:
        """Assign the values of `parametrize` to its parameters, and those of a fixture to it."""
        if not isinstance(node, ast.Call):
            return
        if dotted_name(node.func).endswith("parametrize"):
            texts = [n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)]
            parameters = [name.strip() for name in ",".join(map(str, texts)).split(",")]
            rows = getattr(node.args[1], "elts", [node.args[1]])
            for row in rows:
                parts = getattr(row, "elts", [])
                for i, parameter in enumerate(parameters):
                    alone = len(parameters) > 1 and len(parts) == len(parameters)
                    self.assign(parameter, parts[i] if alone else row)
        for keyword in node.keywords:
            if keyword.arg == "params":
                self.assign(name, keyword.value)
                self.assign("request", keyword.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.take(node.target, node.value)
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Treat `attrs = optree.integrations.attrs` like an import."""
        value = dotted_name(node.value)
        if isinstance(node.targets[0], ast.Name) and inspect.ismodule(self.meant(value)):
            first, _, rest = value.partition(".")
            self.bound[node.targets[0].id] = ".".join(filter(None, (self.bound[first], rest)))
        for target in node.targets:
            self.take(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.take(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.take(node.target, node.iter)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            self.texts.add(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = dotted_name(node.func)
        if name == "getattr" and not isinstance(node.args[1], ast.Constant):
            self.looked_in.append(self.meant(dotted_name(node.args[0])))
        self.called += read_in(node.func)
        if not LOOKING.fullmatch(name.rpartition(".")[2]):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            self.called += filter(None, map(dotted_name, arguments))
        self.generic_visit(node)

    def take(self, target: ast.expr, value: ast.expr) -> None:
        """Assign a value to the variables of a target."""
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self.assign(node.id, value)

    def assign(self, name: str, value: ast.expr) -> None:
        self.values.setdefault(name, []).extend(read_in(value))

    def meant(self, dotted: str) -> Any:
        first, _, rest = dotted.partition(".")
        full = ".".join(filter(None, (self.bound.get(first, ""), rest)))
        return object_of(full) if first in self.bound else None

    def found(self) -> Iterator[Any]:
        """Yield the objects that are called, and those that tables of names select from modules.

        A call of `Tag.of` calls `Tag` as well, and one of a variable each object in its value.
        """
        names, seen = list(self.called), set()
        while names:
            dotted = names.pop()
            if dotted not in seen:
                seen.add(dotted)
                yield self.meant(dotted)
                names += self.values.get(dotted, ())
                names += filter(None, [dotted.rpartition(".")[0]])
        for module in filter(inspect.ismodule, self.looked_in):
            yield from (getattr(module, text) for text in self.texts if text in dir(module))


def called_by(source: str) -> list[Any]:
    """Return the objects called by the source of a test file."""
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


def public_callables(package: str) -> dict[str, Any]:
    """Return the public functions and classes of a package by name, without protocols."""
    found = {}
    for name in public_names(package):
        member = object_of(name)
        ours = str(getattr(member, "__module__", "")).split(".")[0] == package
        protocol = getattr(member, "_is_protocol", False)
        if ours and inspect.isroutine(member) | isinstance(member, type) and not protocol:
            found[name] = member
    return found


def is_called(found: Any, called: dict[int, Any]) -> bool:
    """Return whether a function or class is called; of an abstract class, a subclass."""
    if id(found) in called:
        return True
    below = type.__subclasses__(found) if inspect.isabstract(found) else []
    return any(is_called(each, called) for each in below)


def uncalled(package: str, called: dict[int, Any]) -> list[str]:
    """Return the public functions and classes of a package that no test calls."""
    every = public_callables(package).items()
    return sorted(name for name, member in every if not is_called(member, called))


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
