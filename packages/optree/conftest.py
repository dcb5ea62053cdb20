# SPDX-License-Identifier: Apache-2.0
"""Skip the doctests of integrations whose library is not installed."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore = [
    f"src/optree/integrations/{file}.py"
    for file, library in {
        "attrs": "attrs",
        "jax": "jax",
        "numpy": "numpy",
        "torch": "torch",
    }.items()
    if find_spec(library) is None
]
