# SPDX-License-Identifier: Apache-2.0
"""Competitors, and how each gets an interpreter and a folder of packages of its own."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
RIVALS_FOLDER = BENCHMARKS / ".rivals"

Report = Callable[[str], None]


class RivalError(Exception):
    """A rival cannot take part; the text says why and is shown in its place."""


@dataclass(frozen=True)
class Rival:
    """A competitor: the module that adapts it and the packages it runs on.

    Attributes:
        name: its name in results.
        label: its name in tables.
        module: the module that adapts it, importable from the root of the repository.
        requirements: what pip installs in the rival's own folder, versions pinned; empty for
            a rival that is taken from the running interpreter's packages.
        borrowed: large requirements that are taken from the running interpreter's packages
            if they have exactly this version, and installed otherwise.
        dependencies: whether pip installs the dependencies of the requirements; false if that
            would install a borrowed library again.
        site: a prepared folder of packages to use instead of installing any.
        python: the interpreter, the running one by default.
    """

    name: str
    label: str
    module: str
    requirements: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()
    dependencies: bool = True
    site: Path | None = None
    python: str = field(default=sys.executable)


@dataclass(frozen=True)
class Place:
    """Where a rival's process finds its packages.

    Attributes:
        python: the interpreter.
        paths: folders put on the path, first wins.
        isolated: whether the interpreter's own packages are excluded, so that an installed
            (or editable) package cannot replace the rival's package of the same name.
    """

    python: str
    paths: tuple[Path, ...]
    isolated: bool


def prepare(rival: Rival, report: Report | None = None) -> Place:
    """Return the place of a rival, installing it first if needed.

    Args:
        rival: the competitor.
        report: called with one line of text before something slow starts.

    Raises:
        RivalError: its packages cannot be installed, or the given folder is missing.
    """
    if rival.site is not None:
        if not rival.site.is_dir():
            raise RivalError(f"there is no folder {rival.site}")
        return Place(rival.python, (rival.site,), isolated=True)
    if not rival.requirements and not rival.borrowed:
        return Place(rival.python, (), isolated=False)
    install = list(rival.requirements)
    paths: list[Path] = []
    for requirement in rival.borrowed:
        folder = _installed_here(requirement)
        if folder is None:
            install.append(requirement)
        elif folder not in paths:
            paths.append(folder)
    own = _folder_of(install)
    if install:
        _install(rival, install, own, report)
        paths.insert(0, own)
    return Place(rival.python, tuple(paths), isolated=True)


def _folder_of(requirements: list[str]) -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return RIVALS_FOLDER / tag / "+".join(requirements).replace("==", "-")


def _installed_here(requirement: str) -> Path | None:
    """Return the folder that holds exactly this requirement, if the interpreter has it."""
    name, _, version = requirement.partition("==")
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version.partition("+")[0] != version:
        return None
    return Path(str(distribution.locate_file(""))).resolve()


def _install(rival: Rival, requirements: list[str], folder: Path, report: Report | None) -> None:
    """Install the requirements into a rival's folder, unless it already contains them."""
    marker = folder / "installed.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == requirements:
        return
    if report is not None:
        report(f"installing {' '.join(requirements)} for the benchmark of {rival.label}")
    command = [rival.python, "-m", "pip", "install", "--quiet", "--upgrade", "--target"]
    command += [str(folder), "--disable-pip-version-check", "--no-warn-conflicts"]
    command += [*([] if rival.dependencies else ["--no-deps"]), *requirements]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RivalError(f"pip could not run: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise RivalError(f"pip install {' '.join(requirements)}: {reason}")
    marker.write_text(json.dumps(requirements), encoding="utf-8")
