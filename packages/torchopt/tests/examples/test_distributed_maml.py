# SPDX-License-Identifier: Apache-2.0
"""The distributed example: both backends follow one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.parametrize("backend", ["collective", "rpc"])
def test_two_processes_follow_one(
    load_example: Callable[[str], ModuleType], tmp_path: Path, backend: str
) -> None:
    example = load_example("distributed_maml")
    assert example.main(["--smoke", "--backend", backend, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / f"distributed_maml_{backend}.json").read_text())
    assert results["world_size"] == 2
    assert results["distance"] < 1e-12
    assert results["after"] > results["before"]
