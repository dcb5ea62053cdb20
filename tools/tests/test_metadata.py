# SPDX-License-Identifier: Apache-2.0
"""The metadata of the packages is complete and uniform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11 and newer

PACKAGES = Path(__file__).resolve().parents[2] / "packages"
NAMES = ("optree", "torchopt")


def manifest(name: str) -> dict[str, Any]:
    with (PACKAGES / name / "pyproject.toml").open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)
    return found


def test_both_have_the_same_fields_in_the_same_order() -> None:
    optree, torchopt = (list(manifest(name)["project"]) for name in NAMES)
    assert optree == torchopt
    assert {"name", "description", "readme", "license", "authors", "keywords"} <= set(optree)


def test_both_have_the_same_topics() -> None:
    def shared(name: str) -> list[str]:
        own = ("Programming Language :: Python :: 3.", "Programming Language :: Python :: Free")
        return [c for c in manifest(name)["project"]["classifiers"] if not c.startswith(own)]

    assert shared("optree") == shared("torchopt")


@pytest.mark.parametrize("name", NAMES)
def test_classifiers_name_every_python_from_the_oldest_on(name: str) -> None:
    project = manifest(name)["project"]
    start = "Programming Language :: Python :: 3."
    minors = [int(c.removeprefix(start)) for c in project["classifiers"] if c.startswith(start)]
    assert project["requires-python"] == f">=3.{minors[0]}"
    assert minors == list(range(minors[0], minors[0] + len(minors)))


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist_and_types_travel(name: str) -> None:
    project = manifest(name)["project"]
    for file in (project["readme"], *project["license-files"]):
        assert (PACKAGES / name / file).stat().st_size > 0
    assert (PACKAGES / name / "src" / name / "py.typed").is_file()
    assert (PACKAGES / name / "src" / name / "_C.pyi").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_texts_fit_an_index(name: str) -> None:
    project = manifest(name)["project"]
    assert len(project["description"]) < 100
    assert project["description"].endswith(".")
    assert {"test", "lint", "docs"} <= set(project["optional-dependencies"])
