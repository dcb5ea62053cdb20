# SPDX-License-Identifier: Apache-2.0
"""Trees of objects of other packages. A submodule is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from optree.integrations import attrs, jax, numpy, torch


SUBMODULES: frozenset[str] = frozenset({"attrs", "jax", "numpy", "torch"})


def __dir__() -> list[str]:
    return sorted({"SUBMODULES", *SUBMODULES})


def __getattr__(name: str) -> ModuleType:
    if name in SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
