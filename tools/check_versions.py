# SPDX-License-Identifier: Apache-2.0
"""Check that all places that state a version agree.

* ``packages/P/src/P/version.py`` is what the build and ``P.__version__`` read;
* a version given in ``packages/P/pyproject.toml`` must equal it;
* the newest numbered heading of ``packages/P/CHANGELOG.md`` must equal it;
* torchopt's requirement on optree must include the optree of this checkout and end before the next
  major version, so that no incompatible optree satisfies it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("optree", "torchopt")


class VersionError(ValueError):
    """A version is missing, malformed, or differs from another one."""


def _search(path: Path, pattern: str, what: str, root: Path) -> str:
    shown = path.relative_to(root)
    if not path.is_file():
        raise VersionError(f"expected {what} in {shown}, but there is no such file")
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise VersionError(f"expected {what} in {shown}, found none")
    return match[1]


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    if match is None:
        raise VersionError(f"expected a version like 1.2.3, got {version!r}")
    return tuple(int(part) for part in match[0].split("."))


def version_of(package: str, root: Path = ROOT) -> str:
    """Return the version of a package, after checking every place that states it."""
    folder = root / "packages" / package
    source = folder / "src" / package / "version.py"
    version = _search(source, r"^__version__[^=\n]*=\s*[\"']([^\"']+)[\"']", "__version__", root)
    manifest = (folder / "pyproject.toml").read_text(encoding="utf-8")
    written = re.search(r"^version\s*=\s*\"([^\"]+)\"", manifest, re.MULTILINE)
    if written is not None and written[1] != version:
        raise VersionError(
            f"expected version {version} (from {source.relative_to(root)}) in "
            f"packages/{package}/pyproject.toml, got {written[1]}"
        )
    if written is None and not re.search(r"^dynamic\s*=.*\"version\"", manifest, re.MULTILINE):
        raise VersionError(f"expected a version in packages/{package}/pyproject.toml, found none")
    heading = r"^## \[?v?(\d+\.\d+[^\]\s]*)\]?"
    newest = _search(folder / "CHANGELOG.md", heading, "a heading like `## [1.2.3]`", root)
    if newest != version:
        raise VersionError(
            f"expected {version} as the newest heading of packages/{package}/CHANGELOG.md, "
            f"got {newest}"
        )
    return version


def check_range(optree_version: str, root: Path = ROOT) -> str:
    """Return torchopt's requirement on optree, after checking that it fits ``optree_version``."""
    manifest = root / "packages" / "torchopt" / "pyproject.toml"
    found = _search(manifest, r"\"(optree\s*[<>=!~][^\"]*)\"", "a range of optree versions", root)
    bounds = re.fullmatch(r"optree\s*>=\s*([\d.]+)\s*,\s*<\s*([\d.]+)", found)
    if bounds is None:
        raise VersionError(f"expected torchopt to require `optree>=A,<B`, got `{found}`")
    low, high, here = _numbers(bounds[1]), _numbers(bounds[2]), _numbers(optree_version)
    if not low <= here < high or high > (here[0] + 1,):
        raise VersionError(
            f"expected torchopt's `{found}` to contain optree {optree_version} and to end by "
            f"{here[0] + 1}, so that only this major version is accepted"
        )
    return found


def main() -> int:
    """Print the versions or the disagreement, and return the exit status."""
    try:
        versions = {package: version_of(package) for package in PACKAGES}
        requirement = check_range(versions["optree"])
    except VersionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for package, version in versions.items():
        print(f"{package} {version}")
    print(f"torchopt requires {requirement}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
