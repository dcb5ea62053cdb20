# SPDX-License-Identifier: Apache-2.0
"""The factor by which every operation has to be faster than the published optree 0.20.0.

A change must not fall below these floors: medians on hot trees with the garbage collector off, and
on cold trees. `run.py` prints the cells that miss their floor.
"""

from __future__ import annotations

BASELINE = "optree-0.20.0"

_MODULES = {"flatten": 10.0, "unflatten": 4.0, "map_c": 5.2, "map_python": 4.7}
_SMALL = {"flatten": 6.0, "unflatten": 3.5, "map_c": 9.0, "map_python": 7.0}

FLOORS: dict[str, dict[str, float]] = {
    "resnet18": _MODULES,
    "resnet50": _MODULES,
    "resnet101": _MODULES,
    "resnet152": _MODULES,
    "resnet50_dicts": {"flatten": 17.0, "unflatten": 3.0, "map_c": 7.0, "map_python": 6.0},
    "dict3": _SMALL,
    "tuple3": _SMALL,
    "state_flat": {"flatten": 22.0, "unflatten": 1.5, "map_c": 7.5, "map_python": 5.0},
    "state_nested": {"flatten": 20.0, "unflatten": 2.0, "map_c": 7.5, "map_python": 6.0},
    "dict10k": {"flatten": 45.0, "unflatten": 1.6, "map_c": 12.0, "map_python": 8.0},
    "list10k": {"flatten": 35.0, "unflatten": 5.0, "map_c": 13.0, "map_python": 5.5},
    "million": {"flatten": 18.0, "unflatten": 1.25, "map_c": 6.5, "map_python": 5.0},
    "namedtuples": {"flatten": 30.0, "unflatten": 7.0, "map_c": 11.0, "map_python": 6.0},
    "deep500": {"flatten": 12.0, "unflatten": 1.5, "map_c": 5.0, "map_python": 4.5},
}

COLD_FLOORS = {"new": 2.7, "equal": 3.5, "same": 3.5}
