# SPDX-License-Identifier: Apache-2.0
"""Check that includes and imports go from higher to lower layers only, and draw the layers.

The rules are the tables below. The sources are parsed; nothing is imported or compiled.
Each violation prints one ``file:line: sentence`` and makes the exit status 1.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# --- the rules ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeaderRule:
    """Text that may occur only in some files of a C++ tree."""

    pattern: str  # searched in every line of code, comments removed
    allowed: str  # matched against the path below the tree's root
    reason: str


@dataclass(frozen=True)
class CppTree:
    """A folder of C++ whose sub-folders are layers."""

    root: str
    may_include: dict[
        str, tuple[str, ...]
    ]  # layer -> the other layers whose headers it may include
    headers: tuple[HeaderRule, ...]
    external: tuple[str, ...] = ()  # prefixes of quoted includes that lie outside the tree


@dataclass(frozen=True)
class PythonTree:
    """A Python package whose top-level modules are grouped in layers, lowest first."""

    root: str
    package: str
    layers: tuple[tuple[str, ...], ...] = ()
    # Thin modules kept for their public names: they may import any layer, no layer may import them.
    reexports: frozenset[str] = frozenset()
    # the same within a layer: pattern of the files that re-export names of higher layers
    repeaters: str = "$^"
    # imported top-level name -> pattern of the files (below root) that may import it
    importers: dict[str, str] = field(default_factory=dict)
    # the same, but only for imports that run when the module is imported
    eager_importers: dict[str, str] = field(default_factory=dict)
    # files that may define a subclass of torch.autograd.Function
    function_subclassers: str = ""


NO_TORCH = HeaderRule(
    r'#\s*include\s*[<"](torch|ATen|c10)/',
    r"$^",
    "no header of torch: one wheel serves every torch",
)

CPP = (
    CppTree(
        root="packages/optree/cpp",
        may_include={
            "bind": ("walk", "nodes", "spec", "support", "cpython"),
            "walk": ("nodes", "spec", "support", "cpython"),
            "nodes": ("spec", "support", "cpython"),
            "support": ("cpython",),
            "cpython": (),
            "spec": (),
            "tests": ("spec",),
        },
        headers=(
            HeaderRule(r"pybind11", r"bind/", "pybind11 appears only in bind/"),
            HeaderRule(
                r"\bPython\.h\b",
                r"(bind|walk|nodes|support|cpython)/",
                "spec/ and its tests know no Python",
            ),
            HeaderRule(
                r"\bPy[A-Z]\w*|\bPy_\w+",
                r"(bind|walk|nodes|support|cpython)/",
                "spec/ and its tests know no Python",
            ),
            HeaderRule(
                r"#\s*(el)?if.*\b(PY|PYPY)_\w*VERSION\w*",
                r"cpython/",
                "versions of Python are told apart in cpython/ alone",
            ),
            HeaderRule(
                r"#\s*(el)?if.*\bPy_\w+",
                r"(cpython/|support/sharing\.|nodes/state\.)",
                "builds of Python are told apart in cpython/, and where threads share memory",
            ),
            HeaderRule(
                r"\b(ob_item|ma_\w+|tp_version_tag|_Py[A-Z]\w+|PyFunction_GET_\w+)\b"
                r"|reinterpret_cast<(const )?Py(Dict|ODict|List|Tuple|Function|Code)Object\b",
                r"cpython/",
                "what CPython hides is known in cpython/ alone",
            ),
            HeaderRule(
                r"\bKind::",
                r"(nodes|spec|tests)/",
                "kinds are told apart in nodes/ alone; ask facts_of, dispatch or dispatch_slots",
            ),
            HeaderRule(r"\babsl\b", r"spec/node\w*\.h$", "only spec/node*.h names Abseil"),
            NO_TORCH,
        ),
        external=("absl/",),
    ),
    CppTree(
        root="packages/torchopt/csrc",
        may_include={
            "bind": ("launch", "math"),
            "launch": ("math",),
            "math": (),
            "tests": ("launch", "math"),
        },
        headers=(
            HeaderRule(r"pybind11", r"bind/", "pybind11 appears only in bind/"),
            HeaderRule(r"\bPython\.h\b", r"bind/", "launch/ and math/ know no Python"),
            HeaderRule(
                r"\bomp\.h\b|#\s*pragma\s+omp",
                r"(launch|tests)/",
                "threads are started in launch/ alone",
            ),
            NO_TORCH,
        ),
    ),
)

PYTHON = (
    PythonTree(
        root="packages/optree/src/optree",
        package="optree",
        importers={"torchopt": r"$^"},
        # Only the registry imports _torch_dynamo, when TorchDynamo first queries it.
        eager_importers={
            "torch": r"(integrations/|_torch_dynamo\.py$)",
            **dict.fromkeys(("jax", "numpy", "attr", "attrs"), r"integrations/"),
        },
    ),
    PythonTree(
        root="packages/torchopt/src/torchopt",
        package="torchopt",
        layers=(
            (
                "_C",
                "base",
                "documented",
                "errors",
                "index",
                "lazy",
                "precision",
                "shown",
                "torch_internals",
                "typing",
                "version",
            ),
            ("tree", "tree_function"),
            ("params", "linear_solve", "schedule", "kernels", "update"),
            ("diff", "transform"),
            ("clip", "combine", "hook", "second_order", "solvers"),
            ("optimizers",),
            ("alias",),
            ("optim",),
            ("nn", "distributed", "visual"),
        ),
        reexports=frozenset(
            (
                "accelerated_op",
                "linalg",
                "linear_algebra",
                "pytree",
                "samplers",
                "transforms",
                "utils",
            )
        ),
        repeaters=r"transform/(__init__|trace|scale_by_\w+)\.py$",
        importers={"optree": r"(tree|pytree|typing)\.py$"},
        function_subclassers=r"^tree_function/",
    ),
)


# --- reading --------------------------------------------------------------------------------------


@dataclass
class Report:
    """The findings: violations as ``file:line: sentence``, and the edges between layers."""

    violations: list[str] = field(default_factory=list)
    files: Counter[str] = field(default_factory=Counter)
    edges: Counter[tuple[str, str]] = field(default_factory=Counter)

    def forbid(self, path: Path, line: int, sentence: str) -> None:
        """Add one violation."""
        self.violations.append(f"{path.as_posix()}:{line}: {sentence}")


_COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def _without_comments(text: str) -> str:
    """Blank out comments, keeping line numbers and strings (which hold the include paths)."""

    def blank(match: re.Match[str]) -> str:
        found = match.group()
        return found if found.startswith('"') else "\n" * found.count("\n")

    return _COMMENT_OR_STRING.sub(blank, text)


def check_cpp(tree: CppTree, root: Path = ROOT) -> Report:
    """Check every C++ file below ``tree.root`` against the tree's rules."""
    report = Report()
    base = root / tree.root
    kinds = {".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh", ".inl"}
    for path in sorted(p for p in base.rglob("*") if p.suffix in kinds):
        inside = path.relative_to(base)
        shown = path.relative_to(root)
        layer = inside.parts[0]
        if layer not in tree.may_include:
            known = ", ".join(tree.may_include)
            report.forbid(shown, 1, f"expected a file in one of the layers {known}, got {layer}")
            continue
        report.files[layer] += 1
        code = _without_comments(path.read_text(encoding="utf-8"))
        for match in _INCLUDE.finditer(code):
            if match[1].startswith(tree.external):
                continue
            line = code.count("\n", 0, match.start(1)) + 1
            target = next(
                (t for t in (base / match[1], path.parent / match[1]) if t.is_file()), None
            )
            if target is None:
                report.forbid(shown, line, f'includes "{match[1]}", which is not below {tree.root}')
                continue
            other = target.resolve().relative_to(base.resolve()).parts[0]
            if other == layer:
                continue
            report.edges[layer, other] += 1
            if other not in tree.may_include[layer]:
                allowed = ", ".join(tree.may_include[layer]) or "no other layer"
                report.forbid(
                    shown,
                    line,
                    f'includes "{match[1]}": {layer}/ may include {allowed}, not {other}/',
                )
        for number, text in enumerate(code.splitlines(), 1):
            for rule in tree.headers:
                if re.search(rule.pattern, text) and not re.match(rule.allowed, inside.as_posix()):
                    report.forbid(shown, number, f"`{text.strip()[:60]}`: {rule.reason}")
    return report


def _imports(node: ast.AST, *, eager: bool = True) -> Iterator[tuple[int, str, bool]]:
    """Yield ``(line, dotted name, runs when the module is imported)`` for every import below."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield child.lineno, alias.name, eager
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield child.lineno, f"{child.module}.{alias.name}", eager
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports(ast.Module(child.body, []), eager=False)
            yield from _imports(ast.Module(child.orelse, []), eager=eager)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, eager=eager and not function)


def _function_subclasses(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield ``(line, class name)`` for subclasses of torch.autograd.Function."""
    names = {"torch.autograd.Function", "autograd.Function", "torch.autograd.function.Function"}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.autograd"):
            names |= {
                alias.asname or alias.name for alias in node.names if alias.name == "Function"
            }
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and any(
            ast.unparse(base) in names for base in node.bases
        ):
            yield node.lineno, node.name


def check_python(tree: PythonTree, root: Path = ROOT) -> Report:
    """Check every Python file of a package against the package's rules."""
    report = Report()
    base = root / tree.root
    level = {name: number for number, names in enumerate(tree.layers) for name in names}
    for path in sorted(base.rglob("*.py")):
        inside = path.relative_to(base)
        shown = path.relative_to(root)
        module = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        own = inside.parts[0].removesuffix(".py")
        report.files[own] += 1
        if tree.layers and own not in {*level, *tree.reexports, "__init__"}:
            report.forbid(
                shown, 1, f"expected a module of a layer, got {own}; add it to check_layers.py"
            )
        for line, name, eager in _imports(module):
            parts = name.split(".")
            for table, applies in ((tree.importers, True), (tree.eager_importers, eager)):
                allowed = table.get(parts[0])
                if applies and allowed is not None and not re.match(allowed, inside.as_posix()):
                    where = allowed if allowed != "$^" else "nowhere"
                    report.forbid(shown, line, f"imports {parts[0]}, which is allowed in {where}")
            if parts[0] != tree.package or len(parts) < 2 or own == "__init__":
                continue
            other = parts[1]
            if other == own:
                continue
            if own in level and other in tree.reexports:
                report.forbid(
                    shown, line, f"imports torchopt.{other}, a re-export; import its home"
                )
            if own in level and other in level:
                report.edges[own, other] += 1
                same = level[other] == level[own] and {own, other} != {"tree", "tree_function"}
                repeats = re.match(tree.repeaters, inside.as_posix())
                if not repeats and (level[other] > level[own] or (same and level[own] > 0)):
                    report.forbid(
                        shown,
                        line,
                        f"imports {tree.package}.{other}: layer {level[own]} ({own}) may import "
                        f"only lower layers, not layer {level[other]}",
                    )
        if tree.function_subclassers and not re.match(tree.function_subclassers, inside.as_posix()):
            for line, name in _function_subclasses(module):
                report.forbid(
                    shown,
                    line,
                    f"class {name} subclasses torch.autograd.Function; only "
                    f"{tree.function_subclassers} may",
                )
    return report


# --- drawing --------------------------------------------------------------------------------------


def _arrows(report: Report, layer: str) -> str:
    targets = [(other, n) for (own, other), n in sorted(report.edges.items()) if own == layer]
    return "──▶ " + "  ".join(f"{other}({n})" for other, n in targets) if targets else ""


def draw_cpp(tree: CppTree, report: Report) -> list[str]:
    """Return the layers of a C++ tree, highest first, with the includes that cross them."""
    lines = [f"{tree.root}   (layer, files, includes into other layers)"]
    for layer in tree.may_include:
        lines.append(f"  {layer:10}{report.files[layer]:4}  {_arrows(report, layer)}".rstrip())
    return lines


def draw_python(tree: PythonTree, report: Report) -> list[str]:
    """Return the layers of a package, highest first, with the imports that cross them."""
    if not tree.layers:
        return [f"{tree.root}   {sum(report.files.values())} files, stands alone"]
    lines = [f"{tree.root}   (layer, module, files, imports of lower layers)"]
    for number in reversed(range(len(tree.layers))):
        for name in tree.layers[number]:
            if report.files[name]:
                arrows = _arrows(report, name)
                lines.append(f"  {number}  {name:14}{report.files[name]:4}  {arrows}".rstrip())
    return lines


def main() -> int:
    """Check everything, print the drawing, and return the exit status."""
    violations: list[str] = []
    for cpp in CPP:
        report = check_cpp(cpp)
        print("\n".join(draw_cpp(cpp, report)), end="\n\n")
        violations += report.violations
        if not report.files:
            violations.append(f"{cpp.root}:1: expected C++ sources, found none")
    for python in PYTHON:
        report = check_python(python)
        print("\n".join(draw_python(python, report)), end="\n\n")
        violations += report.violations
        if not report.files:
            violations.append(f"{python.root}:1: expected Python sources, found none")
    for violation in violations:
        print(violation, file=sys.stderr)
    print(f"{len(violations)} violations of the layers" if violations else "The layers hold.")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
