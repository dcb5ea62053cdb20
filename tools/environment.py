# SPDX-License-Identifier: Apache-2.0
"""Set up ``.venv`` with both packages and the tools, then hand over to nox.

This module uses only the standard library, because it runs before anything is installed.
A second run is cheap. ``.venv/dev-stamp.json`` has hashes of the inputs of the environment:

* nothing changed, or only Python files did: nothing is installed (both installs are editable);
* a C++ or CMake file changed: both packages are rebuilt, incrementally;
* a pyproject.toml, the pinned versions or the Python changed: everything is installed again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "dev-stamp.json"
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
PACKAGES = ("packages/optree", "packages/torchopt")

# The build tools are installed first. With them in .venv, the packages are built without an
# isolated environment, so the build trees stay valid and a rebuild compiles only what changed.
BUILD_TOOLS = ("scikit-build-core", "pybind11", "cmake", "ninja")
TORCH = "torch"
TOOLS = (
    *("pytest", "pytest-cov", "hypothesis", "attrs"),
    *("ruff", "mypy", "import-linter", "clang-format", "clang-tidy"),
    *("nox", "build"),
    *("numpy", "scipy", "scikit-learn", "matplotlib", "graphviz", "tqdm", "gymnasium"),
)

TASKS = {
    "setup": "only set up .venv",
    "demo": "run the demonstration on real data: tables and plots (--quick: two minutes)",
    "test": "run the C++ and the Python tests of both packages (further arguments go to pytest)",
    "lint": "check formatting and lint of Python and C++, and the links of Markdown files",
    "format": "rewrite Python and C++ files in the repository's layout",
    "types": "check the types of both packages",
    "layers": "check that includes and imports follow the layers, and that versions agree",
    "stubs": "check the stubs of the extension modules and of the optimizers",
    "pyright": "check the typing cases with pyright",
    "tidy": "run clang-tidy over optree's C++ sources",
    "sanitize": "run the optree tests under AddressSanitizer and UndefinedBehaviorSanitizer",
    "sanitize_kernels": "run torchopt's kernel tests under the same sanitizers",
    "sanitize_cuda_text": "run the source of the CUDA kernels on the host under ThreadSanitizer",
    "cuda": "compile the CUDA kernels and check the machine code (needs nvcc, no GPU)",
    "compiled": "compile inner loops of every kind and with every optimizer (half an hour)",
    "free_threaded": "test optree on a CPython without the interpreter lock",
    "optree_pythons": "build and test optree on every supported Python on PATH",
    "differential": "compare optree with the published package on seeded random programs",
    "clients": "run Keras' tree tests and the published torchopt on optree",
    "bench": "run the benchmarks against other libraries",
    "instructions": "compare instruction counts of tree operations with the stored ones",
    "mutation": "make small wrong changes one at a time and check that a test fails (an hour)",
    "calls": "run a test of each public function and check that it is called (minutes)",
    "docs": "build the documentation of both packages, and run its examples",
    "links": "check the external links of the documentation",
    "wheels": "build the wheels and sdists of both packages, and check them",
    "wheel_tests": "run the tests on those wheels in an empty environment",
    "pure_wheel": "build torchopt without its kernels, and test the wheel",
}

# Lines of pip's output that distinguish a missing index or file from a failed build.
NETWORK_SIGNS = (
    "Failed to establish a new connection",
    "NewConnectionError",
    "ConnectTimeoutError",
    "Connection refused",
    "Temporary failure in name resolution",
    "Name or service not known",
    "Network is unreachable",
    "ProxyError",
    "ReadTimeoutError",
)
MISSING_SIGNS = (
    "No matching distribution found",
    "Could not find a version that satisfies",
    "these package versions have conflicting dependencies",
)


class SetupError(Exception):
    """A requirement that the user has to install is missing; the message is one sentence."""


def say(text: str) -> None:
    """Print a sentence that explains the next step, before the output of child processes."""
    print(f"[dev] {text}", flush=True)


# --- requirements of the machine ------------------------------------------------------------------


def check_machine() -> None:
    """Raise SetupError if a virtual environment or a C++20 extension cannot be made here."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(
                f"expected the standard module {module} in {sys.executable}, found none; install "
                "it (Debian and Ubuntu: apt install python3-venv) and run this again"
            )


def check_compiler() -> None:
    """Raise SetupError if no C++20 compiler is where CMake will look for one."""
    if sys.platform == "win32":  # CMake finds Visual Studio through its registry entry, not PATH.
        return
    chosen = os.environ.get("CXX")
    names = [chosen.split()[0]] if chosen else ["c++", "g++", "clang++"]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise SetupError(
            f"expected a C++ compiler on PATH ({', '.join(names)}), found none; install GCC 11 or "
            "newer, or Clang 14 or newer (Debian and Ubuntu: apt install g++), or set CXX"
        )
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "probe.cpp"
        source.write_text("#include <concepts>\nstatic_assert(std::integral<int>);\n")
        command = [compiler, "-std=c++20", "-fsyntax-only", str(source)]
        probe = subprocess.run(command, check=False, capture_output=True, text=True)
    if probe.returncode != 0:
        reason = next(iter(probe.stderr.strip().splitlines()), "no message")
        raise SetupError(
            f"expected a compiler that supports C++20, but {compiler} does not compile it "
            f"({reason}); install GCC 11 or newer, or Clang 14 or newer, or set CXX"
        )


# --- the stamp ------------------------------------------------------------------------------------


def _digest(paths: Iterable[Path], *extra: str) -> str:
    total = hashlib.sha256("\0".join(extra).encode())
    for path in sorted(paths):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0")
        total.update(path.read_bytes())
    return total.hexdigest()


def _native_sources() -> list[Path]:
    found: list[Path] = []
    for package in PACKAGES:
        folder = ROOT / package
        found += [folder / "CMakeLists.txt"]
        for source in ("cpp", "csrc", "_build"):
            inside = (folder / source).rglob("*")
            found += [p for p in inside if p.is_file() and "__pycache__" not in p.parts]
    return [path for path in found if path.is_file()]


def wanted_stamp() -> dict[str, str]:
    """Return the stamp of an up-to-date environment: one hash for each kind of change."""
    manifests = [ROOT / package / "pyproject.toml" for package in PACKAGES]
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor} {sys.base_prefix}",
        "environment": _digest([CONSTRAINTS, *manifests], str(ROOT), *BUILD_TOOLS, *TOOLS),
        "native": _digest(_native_sources()),
    }


def read_stamp() -> dict[str, str]:
    """Return the stamp of the last complete set-up, or nothing."""
    try:
        stamp = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


# --- .venv ----------------------------------------------------------------------------------------


def _bin(name: str) -> Path:
    folder, suffix = ("Scripts", ".exe") if sys.platform == "win32" else ("bin", "")
    return VENV / folder / f"{name}{suffix}"


def _child_environment() -> dict[str, str]:
    environment = dict(os.environ)
    environment["VIRTUAL_ENV"] = str(VENV)
    environment["PATH"] = os.pathsep.join([str(_bin("python").parent), environment.get("PATH", "")])
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    for name in ("PYTHONHOME", "PYTHONPATH"):  # they would mix another installation into .venv
        environment.pop(name, None)
    return environment


def _usable_venv() -> bool:
    python = _bin("python")
    if not python.is_file():
        return False
    probe = "import sys, pip; print(*sys.version_info[:2], sep='.')"
    done = subprocess.run([str(python), "-c", probe], check=False, capture_output=True, text=True)
    return done.stdout.strip() == f"{sys.version_info.major}.{sys.version_info.minor}"


def _make_venv() -> None:
    say(f"Making .venv with {sys.executable}, so that nothing outside this folder changes.")
    command = [sys.executable, "-m", "venv", "--clear", str(VENV)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0 or not _usable_venv():
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise SetupError(
            f"expected `python -m venv {VENV}` to make an environment with pip, but it failed "
            f"({reason}); install the venv module of this Python (Debian and Ubuntu: apt install "
            "python3-venv) or use another Python"
        )


def _pip_install(arguments: Sequence[str], what: str) -> None:
    command = [
        *(str(_bin("python")), "-m", "pip", "install", "--retries", "2", "--progress-bar", "off"),
        *("--constraint", str(CONSTRAINTS), *arguments),
    ]
    seen: list[str] = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=_child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            seen.append(line.rstrip())
            if line.lstrip().startswith(("Downloading", "Building", "Installing", "Preparing")):
                print(f"      {line.strip()[:110]}", flush=True)
    if pip.returncode == 0:
        return
    output = "\n".join(seen)
    if any(sign in output for sign in NETWORK_SIGNS):
        raise SetupError(
            f"expected to reach a package index to install {what}, but could not connect; "
            "connect to a network, or point PIP_INDEX_URL at an index that can be reached"
        )
    if any(sign in output for sign in MISSING_SIGNS):
        reason = next(line for line in seen if any(sign in line for sign in MISSING_SIGNS))
        raise SetupError(
            f"expected the package index to have {what} for this Python, but it does not "
            f"({reason.removeprefix('ERROR: ')[:160]}); use another index (PIP_INDEX_URL) or "
            "another Python"
        )
    print("\n".join(seen[-60:]), file=sys.stderr, flush=True)
    raise SetupError(
        f"expected to install {what}, but pip failed with status {pip.returncode}; "
        "the end of its output is above"
    )


def set_up() -> None:
    """Bring ``.venv`` up to date with the least work, explaining each step.

    Raises:
        SetupError: If a requirement that the user has to install is missing.
    """
    wanted, found = wanted_stamp(), read_stamp()
    if found == wanted and _usable_venv():
        say("The environment in .venv is up to date.")
        return
    check_machine()
    check_compiler()
    editable = [argument for package in PACKAGES for argument in ("--editable", f"./{package}")]
    same_environment = all(found.get(key) == wanted[key] for key in ("python", "environment"))
    if same_environment and _usable_venv():
        say("C++ sources changed: rebuilding both extensions (only what changed is compiled).")
        STAMP.unlink()
        _pip_install(["--no-build-isolation", "--no-deps", *editable], "the two packages")
    else:
        STAMP.unlink(missing_ok=True)
        if found.get("python") != wanted["python"] or not _usable_venv():
            _make_venv()
        say("Installing the build tools (scikit-build-core, pybind11, CMake, Ninja).")
        _pip_install(BUILD_TOOLS, "the build tools")
        say(
            "Installing the pinned torch, building both packages from this checkout, and adding "
            "the tools: one pip command, so that both packages are taken from here and not from "
            "the index. This downloads torch and compiles C++, and takes minutes."
        )
        _pip_install(
            ["--no-build-isolation", TORCH, *editable, *TOOLS], "torch, the packages and the tools"
        )
    STAMP.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    say("The environment in .venv is ready.")


# --- the command line -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]  # argparse prints two lines
        raise SetupError(f"{message}; run `python3 tools/dev.py --help` for the tasks")


def _parse(arguments: Sequence[str]) -> tuple[str, list[str]]:
    width = max(map(len, TASKS))
    parser = _Parser(
        prog="python3 tools/dev.py",
        description="Set up .venv in this checkout and run one task of noxfile.py in it.",
        epilog="tasks:\n" + "\n".join(f"  {name:{width}}  {text}" for name, text in TASKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", nargs="?", default="", help="one of the tasks below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="passed on to the task")
    parsed = parser.parse_args(arguments)
    if parsed.task not in TASKS:
        got = repr(parsed.task) if parsed.task else "none"
        parser.error(f"expected a task ({', '.join(TASKS)}), got {got}")
    return parsed.task, parsed.rest


def main(arguments: Sequence[str]) -> int:
    """Set up the environment, run the named task, and return its exit status."""
    try:
        task, rest = _parse(arguments)
        set_up()
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if task == "setup":
        return 0
    say(f"Running: {task} ({TASKS[task]}).")
    # The tests' last line is pytest's own summary, so the C++ tests are a task before them.
    sessions = ["cpp_tests", "tests"] if task == "test" else [task]
    for session in sessions:
        passed_on = rest if session in (task, "tests") else []
        command = [str(_bin("python")), "-m", "nox", "--session", session, "--", *passed_on]
        try:
            status = subprocess.run(
                command, check=False, cwd=ROOT, env=_child_environment()
            ).returncode
        except KeyboardInterrupt:
            return 130
        if status != 0:
            return status
    return 0
