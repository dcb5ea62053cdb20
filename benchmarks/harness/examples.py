# SPDX-License-Identifier: Apache-2.0
"""The examples of torchopt as modules, for benchmarks that time what an example does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["load_example"]

EXAMPLES = Path(__file__).resolve().parents[2] / "packages" / "torchopt" / "examples"


def load_example(name: str) -> ModuleType:
    """Return an example, imported once, after the tools that the examples share."""
    for each in ("example_tools", name):
        if each in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(each, EXAMPLES / f"{each}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[each] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
