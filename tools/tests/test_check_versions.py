# SPDX-License-Identifier: Apache-2.0
"""A minimal repository whose versions agree, and each way in which they can disagree."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_versions as versions


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for package, manifest in {
        "optree": '[project]\nname = "optree"\ndynamic = ["version"]\n',
        "torchopt": '[project]\nversion = "1.2.0"\ndependencies = ["optree>=1.1,<2"]\n',
    }.items():
        source = tmp_path / "packages" / package / "src" / package
        source.mkdir(parents=True)
        (source / "version.py").write_text('__version__: str = "1.2.0"\n')
        (source.parent.parent / "pyproject.toml").write_text(manifest)
        (source.parent.parent / "CHANGELOG.md").write_text(
            "# Changelog\n\n## [1.2.0]\n\n## [1.1.0]\n"
        )
    return tmp_path


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_versions_that_agree_are_returned(root: Path) -> None:
    assert versions.version_of("optree", root) == "1.2.0"
    assert versions.version_of("torchopt", root) == "1.2.0"
    assert versions.check_range("1.2.0", root) == "optree>=1.1,<2"


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("pyproject.toml", '"1.2.0"', '"1.2.1"', r"expected version 1\.2\.0 .* got 1\.2\.1"),
        ("CHANGELOG.md", "[1.2.0]", "[1.3.0]", "as the newest heading .* got 1.3.0"),
        ("CHANGELOG.md", "## [", "## v[", "expected a heading like"),
        ("src/torchopt/version.py", "__version__", "version", "expected __version__"),
        ("pyproject.toml", "version =", "revision =", "expected a version"),
    ],
)
def test_a_version_that_differs_or_is_missing_is_named(
    root: Path, file: str, old: str, new: str, expected: str
) -> None:
    rewrite(root / "packages" / "torchopt" / file, old, new)
    with pytest.raises(versions.VersionError, match=expected):
        versions.version_of("torchopt", root)


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        ("optree>=1.1", "expected torchopt to require `optree>=A,<B`"),
        ("optree>=1.3,<2", "to contain optree 1.2.0"),
        ("optree>=0.9,<1", "to contain optree 1.2.0"),
        ("optree>=1.1,<3", "to end by 2"),
    ],
)
def test_a_range_that_misses_or_exceeds_this_optree_is_refused(
    root: Path, requirement: str, expected: str
) -> None:
    rewrite(root / "packages" / "torchopt" / "pyproject.toml", "optree>=1.1,<2", requirement)
    with pytest.raises(versions.VersionError, match=expected):
        versions.check_range("1.2.0", root)
