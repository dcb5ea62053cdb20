# SPDX-License-Identifier: Apache-2.0
"""The distributed example of evolution strategies: learns, and sends losses alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


def test_smoke_run_learns_from_numbers(
    load_example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    example = load_example("distributed_es")
    assert example.main(["--smoke", "--nproc", "3", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "distributed_es.json").read_text())
    assert results["world_size"] == 3
    assert results["checksum"] == results["alone"]["checksum"]
    # 30 losses in each of two rows, 4/3 of which a ring of three sends, a seed for each other rank,
    # and whether the losses raised.
    assert results["bytes_per_step"] <= 2 * 30 * 8 * 4 / 3 + 2 * 8 + 8
    assert results["bytes_per_step"] < results["gradient_bytes"] / 10
