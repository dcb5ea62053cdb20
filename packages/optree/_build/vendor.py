# SPDX-License-Identifier: Apache-2.0
"""Put the few Abseil files that optree compiles into ``third_party/abseil-cpp``.

optree stores its node tables in ``absl::InlinedVector``. That header and its
includes are 25 of Abseil's thousands of files; none of them is committed here. ``ensure()`` fetches
them:

1. if every file listed in ``abseil.sha256`` exists and has the listed hash, it does nothing and
   needs no network (as in an unpacked sdist, or in a checkout that was built before);
2. otherwise ``pip download`` fetches the source distribution named in ``abseil.lock`` (pip checks
   its hash), the listed files are extracted, each is compared with ``abseil.sha256``, and only then
   moved into place.

Run ``python _build/vendor.py`` to do the same by hand, for example before ``cmake --preset dev``.

Moving to another Abseil release: edit ``abseil.lock``; unpack the new sdist; list the closure with
``g++ -std=c++20 -M -I . absl/container/inlined_vector.h`` plus what ``absl/base/throw_delegate.cc``
adds (following conditional includes too); write ``sha256sum`` of that list to ``abseil.sha256``;
change the version in NOTICE.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "abseil.lock"
SUMS = HERE / "abseil.sha256"
TARGET = HERE.parent / "third_party" / "abseil-cpp"


class VendorError(RuntimeError):
    """Abseil could not be fetched, or is not the locked version."""


def locked_files() -> dict[str, str]:
    """Return ``{path below third_party/abseil-cpp: sha256}`` as committed in ``abseil.sha256``."""
    files = {}
    for line in SUMS.read_text(encoding="ascii").splitlines():
        digest, _, name = line.partition("  ")
        files[name] = digest
    return files


def missing(target: Path = TARGET) -> list[str]:
    """Return the locked files that are absent below ``target``.

    Raises:
        VendorError: If a file exists but its content is not the locked one.
    """
    absent = []
    for name, digest in locked_files().items():
        path = target / name
        if not path.is_file():
            absent.append(name)
            continue
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != digest:
            raise VendorError(
                f"expected {path} to have sha256 {digest} (from {SUMS.name}), got {found}; "
                f"delete {target} and build again"
            )
    return absent


def ensure(target: Path = TARGET) -> None:
    """Make ``target`` hold every locked file, downloading only if one is absent.

    Raises:
        VendorError: If the download failed, or its content is not the locked one.
    """
    if not missing(target):
        return
    with tempfile.TemporaryDirectory(prefix="optree-abseil-") as scratch:
        archive = _download(Path(scratch))
        contents = _extract(archive)
    for name, content in contents.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(path)


def _download(directory: Path) -> Path:
    requirement = LOCK.read_text(encoding="ascii").splitlines()[-1].split()[0]
    project = requirement.partition("==")[0]
    # --no-binary names the one project: ':all:' would build its build tools from source (minutes).
    # --ignore-requires-python: only headers are taken, so the sdist's own range does not matter.
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--ignore-requires-python", "--require-hashes", "--no-binary", project),
        *("--dest", str(directory), "-r", str(LOCK)),
    ]
    print(f"optree: fetching the Abseil headers ({requirement}, hash-locked)", file=sys.stderr)
    # This process may itself be a build hook. The variables that name its backend must not reach
    # pip, whose hook for the downloaded sdist would use our backend path.
    ours = ("_PYPROJECT_HOOKS_", "PEP517_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        command,
        check=False,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    archives = sorted(directory.glob("*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        raise VendorError(
            f"expected to download {requirement} for its Abseil headers, but pip failed (status "
            f"{done.returncode}); connect to a package index, or build from an sdist of optree, "
            f"which contains them.\n{done.stdout.strip()}"
        )
    return archives[0]


def _extract(archive: Path) -> dict[str, bytes]:
    wanted = locked_files()
    contents: dict[str, bytes] = {}
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            _, _, name = member.name.partition("/third_party/abseil-cpp/")
            if name not in wanted or not member.isfile():
                continue
            stream = tar.extractfile(member)
            assert stream is not None, member.name
            contents[name] = stream.read()
    for name, digest in wanted.items():
        if name not in contents:
            raise VendorError(
                f"expected {name} in {archive.name}, found none; "
                f"{LOCK.name} and {SUMS.name} name different releases"
            )
        found = hashlib.sha256(contents[name]).hexdigest()
        if found != digest:
            raise VendorError(f"expected sha256 {digest} for {name} in {archive}, got {found}")
    return contents


if __name__ == "__main__":
    try:
        ensure()
    except VendorError as error:
        sys.exit(f"error: {error}")
    print(f"{len(locked_files())} Abseil files are in {TARGET}")
