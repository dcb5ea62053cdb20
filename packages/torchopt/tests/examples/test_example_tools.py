# SPDX-License-Identifier: Apache-2.0
"""What examples share, and what every example has."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "example_tools")


@pytest.mark.parametrize("name", NAMES)
def test_every_example_names_its_paper_and_has_a_smoke_run(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    doc = text.partition('"""')[2].partition('"""')[0]
    assert re.search(r"^References:\n", doc, re.M)
    assert "--smoke" in text


def test_the_table_of_results_names_examples_that_exist() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)\.py`", table, re.M))
    assert named
    assert named <= set(NAMES)


@dataclass(frozen=True)
class Config:
    seed: int = 0
    size: int = 1


def test_a_full_run_that_fails_its_result_returns_one(
    load_example: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    tools = load_example("example_tools")
    presets = {"full": Config(size=2), "smoke": Config()}

    def run(config: Config, out: Path) -> dict[str, Any]:
        return {"size": config.size}

    def call(*options: str, reached: bool) -> int:
        arguments = ["--out", str(tmp_path), *options]
        status: int = tools.run_example(
            "Doc.", "it", presets, run, lambda results: reached, arguments
        )
        return status

    assert call(reached=True) == 0
    assert call(reached=False) == 1
    assert call("--smoke", reached=False) == 0
    assert '"size": 1' in (tmp_path / "it.json").read_text()
