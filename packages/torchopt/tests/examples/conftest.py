# SPDX-License-Identifier: Apache-2.0
"""Examples as modules, and their smoke runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session")
def load_example() -> Callable[[str], ModuleType]:
    """Return a function that imports an example by its name, once."""
    for name in ("sklearn", "matplotlib", "tqdm"):
        pytest.importorskip(name)

    def load(name: str) -> ModuleType:
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(EXAMPLES))  # for the tools that examples share
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(EXAMPLES))
        return module

    return load


@pytest.fixture
def smoke(tmp_path: Path) -> Callable[[ModuleType], dict[str, Any]]:
    """Return a function that runs an example for seconds and returns the results it wrote."""

    def run(example: ModuleType) -> dict[str, Any]:
        name = example.__name__
        assert example.main(["--smoke", "--out", str(tmp_path)]) == 0
        results: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        plots = list(tmp_path.glob(f"{name}*.png"))
        assert plots
        assert all(plot.stat().st_size > 1000 for plot in plots)
        return results

    return run
