# SPDX-License-Identifier: Apache-2.0
"""Importing torchopt is quick: modules are imported at first use, optional ones only if needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import torchopt

OPTIONAL = {
    *("graphviz", "matplotlib", "scipy", "sklearn", "tqdm", "jax", "attr", "gymnasium"),
    *("functorch", "torch._dynamo", "torch._inductor", "sympy", "torch.distributed.rpc"),
}


def modules_after(*statements: str) -> set[str]:
    """Return the modules that a fresh interpreter has imported in addition to those of torch."""
    program = "import sys, torch; before = set(sys.modules)\n" + "\n".join(statements)
    program += "\nprint(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_importing_the_package_imports_nothing_else() -> None:
    assert modules_after("import torchopt") == {
        *("torchopt", "torchopt.index", "torchopt.version"),
    }


def test_using_optimizers_imports_nothing_optional() -> None:
    found = modules_after("import torchopt", "torchopt.adam(0.1)", "torchopt.MetaAdam")
    assert "torchopt.alias.adam" in found
    assert not {m for m in found if m in OPTIONAL or m.partition(".")[0] in OPTIONAL}
    families = {f"torchopt.{name}" for name in ("diff", "linear_solve", "nn", "visual")}
    assert not families & found


def test_the_other_families_import_nothing_optional() -> None:
    families = ("diff", "linear_solve", "nn", "visual")
    found = modules_after(*(f"import torchopt.{family}" for family in families))
    assert not {m for m in found if m in OPTIONAL or m.partition(".")[0] in OPTIONAL}


def test_every_public_name_exists_and_is_listed() -> None:
    for name in torchopt.__all__:
        assert getattr(torchopt, name) is not None
    assert set(torchopt.__all__) == set(torchopt._HOMES)
    assert set(torchopt.__all__) <= set(dir(torchopt))
    with pytest.raises(AttributeError, match="no attribute 'adaam'"):
        torchopt.adaam  # noqa: B018


def test_names_are_those_of_their_modules() -> None:
    from torchopt import alias, optim, update

    assert torchopt.adam is alias.adam
    assert torchopt.Adam is optim.Adam
    assert torchopt.MetaAdam is optim.meta.MetaAdam
    assert torchopt.apply_updates is update.apply_updates


def test_no_module_takes_the_place_of_a_public_name() -> None:
    """Importing a module sets an attribute of its package, which may hide a function."""
    program = """
import importlib, inspect, pkgutil, torchopt

packages = [importlib.import_module(f"torchopt.{name}") for name in
            ("alias", "optim", "optim.func", "optim.meta", "schedule", "transform")]
for package in packages:
    before = {name: getattr(package, name) for name in package.__all__}
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for name, value in before.items():
        assert getattr(package, name) is value, f"{package.__name__}.{name}"
        assert not inspect.ismodule(value), f"{package.__name__}.{name}"
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
