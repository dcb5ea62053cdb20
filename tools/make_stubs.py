#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Write the stubs of torchopt's optimizers for type checkers and editors, or check them.

The classes of optimizers are created at import from the functions in `torchopt.index`, so static
tools cannot see them. The stubs of the three packages that contain them declare every class with
all its arguments and nothing else, so that a misspelt name is an error::

    python tools/make_stubs.py            # write the stubs
    python tools/make_stubs.py --check    # exit with status 1 if a stub is not current
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from inspect import Parameter
from pathlib import Path
from typing import Any

import torchopt
from torchopt.index import ALIASES, OPTIMIZERS

SOURCE = Path(__file__).resolve().parent.parent / "packages" / "torchopt" / "src"
HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Written by tools/make_stubs.py; run it after a change instead of editing this file.
"""
# The modules of the names used in annotations.
ORIGINS = {
    "Any": "typing",
    "Callable": "collections.abc",
    "Iterable": "collections.abc",
    "ScalarOrSchedule": "torchopt.typing",
    "Tensor": "torch",
    "nn": "torch",
}


def import_lines(module: str, names: Iterable[str]) -> str:
    """Return an import that type checkers treat as a re-export."""
    line = f"from {module} import {', '.join(f'{name} as {name}' for name in sorted(names))}\n"
    if len(line) <= 101:
        return line
    listed = "\n".join(f"    {name} as {name}," for name in sorted(names))
    return f"from {module} import (\n{listed}\n)\n"


def all_lines(names: Iterable[str]) -> str:
    """Return the list of public names."""
    return f"__all__ = [\n{filled([repr(name) for name in sorted(names)], 4)}\n]\n"


def filled(parts: Iterable[str], indent: int) -> str:
    """Return the parts, each followed by a comma, in lines of at most 100 columns."""
    lines = [" " * indent]
    for part in parts:
        if len(lines[-1]) + len(part) + 1 > 100:
            lines.append(" " * indent)
        lines[-1] += f"{part}, "
    return "\n".join(line.rstrip() for line in lines)


def class_text(cls: type[Any]) -> str:
    """Return the declaration of a class of optimizers."""
    parts = ["self"]
    for p in inspect.signature(cls).parameters.values():
        if p.kind is Parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        default = "" if p.default is p.empty else f" = {p.default!r}"
        parts.append(f"{p.name}: {p.annotation}{default}")
    summary = inspect.cleandoc(cls.__doc__ or "").splitlines()[0]
    return (
        f'class {cls.__name__}({cls.__bases__[0].__name__}):\n    """{summary}"""\n\n'
        f"    def __init__(\n{filled(parts, 8)}\n    ) -> None: ...\n"
    )


def annotation_imports(classes: list[type[Any]]) -> str:
    """Return imports of the names used in the annotations of classes."""
    used: dict[str, set[str]] = {}
    for cls in classes:
        for p in inspect.signature(cls).parameters.values():
            for name in re.findall(r"(?<![.\w])[A-Za-z]\w*", p.annotation):
                if name in ORIGINS:
                    used.setdefault(ORIGINS[name], set()).add(name)
                elif name not in ("bool", "float", "int", "str", "tuple", "None"):
                    raise LookupError(
                        f"{cls.__name__}({p.name}: {p.annotation}): expected names of ORIGINS, got "
                        f"{name}; add where it comes from"
                    )
    return "".join(
        f"from {module} import {', '.join(sorted(names))}\n"
        for module, names in sorted(used.items())
    )


def optim_stub(package: str, prefix: str, others: dict[str, str]) -> str:
    """Return the stub of a package of classes, with the additional names `others` (by module)."""
    module = importlib.import_module(package)
    classes = [getattr(module, prefix + name) for name in OPTIMIZERS.values()]
    aliases = [f"{prefix}{alias} = {prefix}{name}\n" for alias, name in ALIASES.items()]
    return "\n".join(
        [
            HEAD + f'"""{inspect.getdoc(module)}\n"""\n',
            annotation_imports(classes),
            "".join(import_lines(home, [name]) for name, home in sorted(others.items())),
            all_lines(module.__all__),
            *map(class_text, classes),
            "".join(aliases),
        ]
    )


def package_stub() -> str:
    """Return the stub of `torchopt`, whose names are imported on first use."""
    homes: dict[str, list[str]] = {}
    tables = vars(torchopt)
    for name, (home, original) in (*tables["_HOMES"].items(), *tables["_APART"].items()):
        homes.setdefault(home, []).append(f"{original} as {name}")
    modules = [name for name in (*tables["_CORE"], *tables["_LATER"]) if "." not in name]
    lines = [import_lines("torchopt", [*modules, "index", "version"])]
    for home, names in sorted(homes.items()):
        listed = "\n".join(f"    {name}," for name in sorted(names))
        lines.append(f"from {home} import (\n{listed}\n)\n")
    lines.append("from torchopt.version import __version__ as __version__\n")
    return "\n".join(
        [
            HEAD + f'"""{inspect.getdoc(torchopt)}\n"""\n',
            "".join(lines),
            all_lines(torchopt.__all__),
        ]
    )


def repeating_stub(package: str) -> str:
    """Return the stub of a package that re-exports names of other modules."""
    module = importlib.import_module(package)
    homes: dict[str, list[str]] = {}
    for name, value in vars(module).items():
        if inspect.ismodule(value) and value.__name__ == f"{package}.{name}":
            homes.setdefault(package, []).append(name)
        elif (
            (inspect.isroutine(value) or isinstance(value, type))
            and not name.startswith("_")
            and value.__module__ != "torchopt.index"
        ):
            homes.setdefault(value.__module__, []).append(name)
    public = [name for name in module.__all__ if name not in homes.get(package, [])]
    modules = [name for name in homes.pop(package, []) if name == "utils"]
    lines = [import_lines(package, modules)] if modules else []
    lines += [import_lines(home, names) for home, names in sorted(homes.items())]
    return "\n".join(
        [HEAD + f'"""{inspect.getdoc(module)}\n"""\n', "".join(lines), all_lines(public)]
    )


def stubs() -> dict[Path, str]:
    """Return the expected text of each stub."""
    classic = {
        "FuncOptimizer": "torchopt.optim.func",
        "Optimizer": "torchopt.optim.base",
        "TorchOptimizer": "torchopt.optim.torch_optimizer",
    }
    meta = {"MetaOptimizer": "torchopt.optim.meta.base"}
    package = SOURCE / "torchopt"
    optim = package / "optim"
    return {
        package / "__init__.pyi": package_stub(),
        **{
            package / name / "__init__.pyi": repeating_stub(f"torchopt.{name}")
            for name in ("alias", "transform")
        },
        optim / "__init__.pyi": optim_stub("torchopt.optim", "", classic),
        optim / "meta" / "__init__.pyi": optim_stub("torchopt.optim.meta", "Meta", meta),
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the stubs, or check them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; report what differs")
    check = parser.parse_args(arguments).check
    stale = []
    for path, text in stubs().items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(SOURCE))
            if not check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'not current; run python tools/make_stubs.py' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
