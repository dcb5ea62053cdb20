#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Test optree on a CPython without the global interpreter lock; opt-in, minutes.

    python3 tools/dev.py free_threaded                           # find or build an interpreter
    python3 tools/dev.py free_threaded -- python3.14t            # use this one
    python3 tools/dev.py free_threaded -- Python-3.14.2.tar.xz   # build this source archive
    python3 tools/dev.py free_threaded -- ... --races            # under ThreadSanitizer
    python3 tools/dev.py free_threaded -- ... -k threads         # the rest goes to pytest

Few machines have such an interpreter, and package indexes do not offer one. The task uses one that
is on PATH or was built before. Otherwise it builds the given archive, or the source package of
Debian, fetched by apt into a private folder so that the package lists of the machine do not change.
Interpreter, environment and build live in ``build/free-threaded``.

Only tests that need nothing but Python, pytest and hypothesis run, because numerical packages have
no wheels for such interpreters and would take many minutes to compile. Afterwards the throughput
of two threads is printed. With ``--races`` only the tests of threads run, and a data race in optree
fails them. Reports from within the interpreter are ignored, because ThreadSanitizer cannot see its
locks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTREE = ROOT / "packages" / "optree"
PLACE = ROOT / "build" / "free-threaded"
NAMES = ("python3.15t", "python3.14t", "python3.13t")
# A Debian release whose Python has the option --disable-gil (3.13 or newer), and that Python.
DEBIAN = ("trixie", "python3.13")
# The tests that start threads.
RACED = ("threads", "registry_threads", "iterate")
QUESTION = "import sysconfig, sys; sys.exit(not sysconfig.get_config_var('Py_GIL_DISABLED'))"


class MissingError(Exception):
    """A requirement of the task is missing; the text says what to do."""


def run(
    *command: str | Path, cwd: Path = ROOT, log: Path | None = None, **environment: str
) -> None:
    """Run a command; its output goes to the terminal or to a file."""
    print("$", *command, flush=True)
    if log is None:
        variables = {**os.environ, **environment}
        subprocess.run(list(map(str, command)), cwd=cwd, check=True, env=variables)
        return
    with log.open("w") as output:
        subprocess.run(list(map(str, command)), cwd=cwd, stdout=output, stderr=output, check=True)


def is_free_threaded(python: str | Path) -> bool:
    """Return whether a program is a Python built without the lock."""
    try:
        return subprocess.run([str(python), "-c", QUESTION], capture_output=True).returncode == 0
    except OSError:
        return False


def find_python() -> Path | None:
    """Return an interpreter on PATH, or one that this task built before."""
    candidates = [shutil.which(name) for name in NAMES]
    candidates += [str(PLACE / "python" / "bin" / name) for name in NAMES]
    found = (python for python in candidates if python is not None and is_free_threaded(python))
    return next(map(Path, found), None)


def debian_source() -> Path:
    """Return the source archive of Debian's Python, downloaded through apt."""
    if shutil.which("apt-get") is None:
        raise MissingError(
            "expected python3.13t or newer on PATH, found none, and no apt-get to fetch the source "
            "with; name an interpreter or a source archive of CPython 3.13 or newer after --"
        )
    release, package = DEBIAN
    sites = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    site = next((site for site in sites if site.rstrip("/").endswith("/debian")), None)
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    if site is None or not keys.exists():
        raise MissingError("expected a Debian with its archive configured; name a source archive")
    apt = PLACE / "apt"
    for folder in ("etc/apt.conf.d", "etc/preferences.d", "lib/lists/partial", "cache/archives"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "etc/sources.list").write_text(f"deb-src [signed-by={keys}] {site} {release} main\n")
    (apt / "status").touch()
    options = [f"-oDir::Etc={apt}/etc", f"-oDir::State={apt}/lib", f"-oDir::Cache={apt}/cache",
               f"-oDir::State::status={apt}/status"]  # fmt: skip
    run("apt-get", *options, "-qq", "update")
    run("apt-get", *options, "-qq", "source", "--download-only", package, cwd=apt)
    archives = sorted(apt.glob(f"{package}_*.orig.tar.*z*"))
    return next(path for path in archives if path.suffix != ".asc")


def build_python(archive: Path) -> Path:
    """Build and install the interpreter of a source archive; 5 to 10 minutes."""
    source = PLACE / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    with tarfile.open(archive) as tar:
        if sys.version_info >= (3, 12):
            tar.extractall(source, filter="data")
        else:
            tar.extractall(source)
    tree = next(path.parent for path in source.glob("*/configure"))
    jobs = os.cpu_count() or 1
    run("./configure", "--disable-gil", f"--prefix={PLACE / 'python'}", cwd=tree,
        log=PLACE / "configure.log")  # fmt: skip
    run("make", f"-j{jobs}", cwd=tree, log=PLACE / "make.log")
    run("make", "altinstall", cwd=tree, log=PLACE / "install.log")
    python = find_python()
    if python is None:
        raise MissingError(f"the build made no interpreter without the lock; see {PLACE}/*.log")
    shutil.rmtree(source)
    return python


def choose_python(arguments: list[str]) -> tuple[Path, list[str]]:
    """Return the interpreter to use and the remaining arguments, which go to pytest."""
    if arguments and not arguments[0].startswith("-"):
        first, *rest = arguments
        if ".tar." in first:
            return build_python(Path(first).resolve()), rest
        python = shutil.which(first)
        if python is None or not is_free_threaded(python):
            raise MissingError(
                f"expected a Python without the lock or a source archive, got {first}"
            )
        return Path(python), rest
    return find_python() or build_python(debian_source()), arguments


def look_for_races(python: Path, pip: tuple[str | Path, ...]) -> None:
    """Run the tests of threads with an extension that ThreadSanitizer instruments."""
    settings = ("-Ccmake.define.OPTREE_SANITIZE=thread", "-Ccmake.build-type=RelWithDebInfo")
    run(*pip, "--no-deps", *settings, OPTREE)
    library = subprocess.check_output(["gcc", "-print-file-name=libtsan.so"], text=True).strip()
    tests = [OPTREE / "tests" / f"test_{name}.py" for name in RACED]
    # A randomised layout may place the program in the shadow memory of the sanitizer: setarch -R.
    run("setarch", "-R", python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests,
        LD_PRELOAD=library, TSAN_OPTIONS="ignore_noninstrumented_modules=1")  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run the task and return the exit status."""
    PLACE.mkdir(parents=True, exist_ok=True)
    try:
        python, rest = choose_python(arguments)
        environment = PLACE / "venv"
        run(python, "-m", "venv", "--clear", environment)
        inside = environment / "bin" / "python"
        pip = (inside, "-m", "pip", "install", "--quiet")
        run(*pip, "--only-binary", ":all:", "pytest", "hypothesis", "typing-extensions", "attrs")
        if "--races" in rest:
            look_for_races(inside, pip)
            return 0
        run(*pip, "--no-deps", OPTREE)
        run(inside, "-m", "pytest", "-q", "-p", "no:cacheprovider", OPTREE / "tests", *rest)
        threads = ("-m", "benchmarks.optree.threads")
        run(inside, *threads, "--output", PLACE / "optree_threads.json")
        print(
            f"on a quiet machine, `{inside} {' '.join(threads)}` stores the figures of the manual"
        )
    except MissingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
