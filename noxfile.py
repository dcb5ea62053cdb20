# SPDX-License-Identifier: Apache-2.0
"""All developer tasks; ``python3 tools/dev.py TASK`` makes ``.venv`` and runs one of them in it.

The sessions share that environment instead of making their own, so that each starts quickly.
Arguments after ``--`` go to the tool: ``nox -s tests -- packages/optree/tests -k paths``.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import nox

nox.needs_version = ">=2024.4"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "layers", "cpp_tests", "tests"]


def _leaves_the_last_word_to_pytest(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return record.levelno >= logging.WARNING and not (
        text.startswith("Session tests") or "-m pytest" in text
    )


# Whether the tests pass or fail, pytest's summary is the last line printed.
logging.getLogger("nox").addFilter(_leaves_the_last_word_to_pytest)

ROOT = Path(__file__).resolve().parent
BIN = ROOT / ".venv" / ("Scripts" if os.name == "nt" else "bin")
PYTHON = str(BIN / "python")
OPTREE = ROOT / "packages" / "optree"
TORCHOPT = ROOT / "packages" / "torchopt"
BUILD = ROOT / "build"

# OpenMP threads sleep between regions: threads that spin slow down a shared machine.
QUIET = {"OMP_WAIT_POLICY": "passive", "MPLBACKEND": "Agg", "PYTHONHASHSEED": "0"}


def run(session: nox.Session, *command: str | Path, **environment: str) -> None:
    """Run a command with ``.venv`` first on PATH, from the repository root."""
    if not Path(PYTHON).exists():
        session.error("expected .venv, found none; run `python3 tools/dev.py setup` first")
    path = os.pathsep.join([str(BIN), os.environ.get("PATH", "")])
    program = shutil.which(str(command[0]), path=path) or str(command[0])
    session.chdir(ROOT)
    arguments = map(str, command[1:])
    session.run(program, *arguments, external=True, env={"PATH": path, **environment})


def cpp_files() -> list[str]:
    """Return our C++ and CUDA files, relative to the root."""
    folders = (OPTREE / "cpp", TORCHOPT / "csrc")
    kinds = {".h", ".hpp", ".cpp", ".cc", ".cu", ".cuh"}
    found = (path for folder in folders for path in folder.rglob("*") if path.suffix in kinds)
    return sorted(str(path.relative_to(ROOT)) for path in found)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the Python tests and doctests of both packages and of the tools."""
    run(session, PYTHON, "-m", "pytest", *session.posargs, **QUIET)


# Options for building only the C++ tests: no interpreter, warnings are errors.
CPP_TESTS = {
    OPTREE: ["-DOPTREE_BUILD_EXTENSION=OFF", "-DOPTREE_BUILD_TESTS=ON", "-DOPTREE_WERROR=ON"],
    TORCHOPT: [
        *("-DTORCHOPT_PYTHON=OFF", "-DTORCHOPT_TESTS=ON", "-DTORCHOPT_WERROR=ON"),
        "-DTORCHOPT_CUDA=OFF",
    ],
}


@nox.session
def cpp_tests(session: nox.Session) -> None:
    """Build and run the C++ tests, which need no interpreter; warnings are errors."""
    for package, options in CPP_TESTS.items():
        build = BUILD / "cpp-tests" / package.name
        run(session, "cmake", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug", "--log-level=WARNING",
            *options, "-S", package, "-B", build)  # fmt: skip
        run(session, "cmake", "--build", build, "--parallel", "2", "--", "--quiet")
        run(session, "ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")


@nox.session
def lint(session: nox.Session) -> None:
    """Check lint and layout of Python and C++, and links, without changing a file."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "clang-format", "--dry-run", "-Werror", *cpp_files())
    run(session, PYTHON, "tools/check_links.py")


@nox.session(name="format")
def format_(session: nox.Session) -> None:
    """Rewrite Python and C++ files in the repository's layout, and fix what can be fixed."""
    run(session, "ruff", "check", "--fix", ".")
    run(session, "ruff", "format", ".")
    run(session, "clang-format", "-i", *cpp_files())


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of both packages and of the tools."""
    run(session, "mypy", *session.posargs)


@nox.session
def layers(session: nox.Session) -> None:
    """Check the direction of includes and imports, and that the versions agree."""
    run(session, PYTHON, "tools/check_layers.py")
    source = os.pathsep.join([str(OPTREE / "src"), str(TORCHOPT / "src")])
    run(session, "lint-imports", "--no-cache", PYTHONPATH=source)
    run(session, PYTHON, "tools/check_versions.py")


@nox.session
def stubs(session: nox.Session) -> None:
    """Check the stubs of the extension modules and of the optimizers against the modules."""
    run(session, PYTHON, "tools/make_stubs.py", "--check")
    run(session, PYTHON, "-m", "mypy.stubtest", "optree._C", "torchopt._C",
        "torchopt.optim", "--allowlist", "tools/stubtest_allowlist.txt",
        *session.posargs)  # fmt: skip


@nox.session
def pyright(session: nox.Session) -> None:
    """Check with pyright what the typing tests check with mypy (downloads pyright)."""
    run(session, PYTHON, "-m", "pip", "install", "--quiet", "pyright")
    run(session, PYTHON, "-m", "pyright", "--pythonpath", PYTHON, *session.posargs,
        "packages/optree/tests/typing/cases", "packages/torchopt/tests/typing/cases")  # fmt: skip


@nox.session
def tidy(session: nox.Session) -> None:
    """Run clang-tidy over optree's C++ sources (minutes)."""
    build = BUILD / "tidy"
    run(session, "cmake", "--preset", "debug", "-S", OPTREE, "-B", build, "-DOPTREE_INPLACE=OFF",
        f"-DPython_EXECUTABLE={PYTHON}", "--log-level=WARNING")  # fmt: skip
    sources = [name for name in cpp_files() if name.endswith(".cpp") and "optree/cpp/" in name]
    run(session, "clang-tidy", "--quiet", "-p", build, *sources)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run optree's C++ and Python tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    build = BUILD / "sanitize"
    site = build / "site"
    run(session, "cmake", "--preset", "sanitize", "-S", OPTREE, "-B", build, "--log-level=WARNING",
        f"-DPython_EXECUTABLE={PYTHON}")  # fmt: skip
    run(session, "cmake", "--build", build, "--parallel", "2", "--", "--quiet")
    run(session, "ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    shutil.rmtree(site, ignore_errors=True)
    ignore = shutil.ignore_patterns("_C*.so", "__pycache__")
    shutil.copytree(OPTREE / "src" / "optree", site / "optree", ignore=ignore)
    run(session, "cmake", "--install", build, "--prefix", site)
    _run_instrumented(session, site, session.posargs or ["packages/optree/tests"])


def _run_instrumented(session: nox.Session, site: Path, arguments: list[str]) -> None:
    """Run tests with the packages in `site`, which sanitizers instrument."""
    libraries = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    # -S: without .pth files the editable install cannot shadow the instrumented extension.
    purelib = sysconfig.get_path("purelib", vars={"base": str(ROOT / ".venv")})
    run(session, PYTHON, "-S", "-m", "pytest", "-p", "no:cacheprovider", *arguments, **QUIET,
        PYTHONPATH=os.pathsep.join([str(site), purelib]), PYTHONMALLOC="malloc",
        LD_PRELOAD=" ".join(libraries), ASAN_OPTIONS="detect_leaks=0")  # fmt: skip


@nox.session
def cuda(session: nox.Session) -> None:
    """Compile the CUDA kernels for the usual architectures (needs nvcc, no GPU; minutes)."""
    build = BUILD / "cuda"
    run(session, "cmake", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DTORCHOPT_CUDA=ON",
        "-DTORCHOPT_PYTHON=OFF", "-S", TORCHOPT, "-B", build)  # fmt: skip
    run(session, "cmake", "--build", build, "--parallel", "2", "--target", "torchopt_cuda", "--",
        "--quiet")  # fmt: skip
    run(session, PYTHON, "tools/check_cuda_code.py")


KERNEL_TESTS = (
    *("test_fuzz.py", "test_devices.py", "test_fused_call.py", "test_fused_update.py"),
    "test_fused_step.py",
)


@nox.session
def sanitize_cuda_text(session: nox.Session) -> None:
    """Run the source of the CUDA kernels on the host: ThreadSanitizer finds missing barriers."""
    build = BUILD / "sanitize-cuda-text"
    # No OpenMP, because its library is not instrumented.  -O0 makes no clones for instruction sets:
    # their resolvers would run before the sanitizer is initialised.
    run(session, "cmake", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug", "--log-level=WARNING",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g1 -fsanitize=thread", "-DTORCHOPT_CUDA=OFF",
        "-DTORCHOPT_OPENMP=OFF", "-DTORCHOPT_PYTHON=OFF", "-DTORCHOPT_TESTS=ON", "-S", TORCHOPT,
        "-B", build)  # fmt: skip
    run(session, "cmake", "--build", build, "--parallel", "2", "--target", "test_cuda_text", "--",
        "--quiet")  # fmt: skip
    run(session, build / "test_cuda_text", TSAN_OPTIONS="halt_on_error=1")


@nox.session
def sanitize_kernels(session: nox.Session) -> None:
    """Run torchopt's kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer."""
    build = BUILD / "sanitize-kernels"
    site = build / "site"
    pybind11 = subprocess.check_output([PYTHON, "-m", "pybind11", "--cmakedir"], text=True).strip()
    # -O0: with a check of every operation, optimising takes the compiler minutes for each rule.
    flags = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    run(session, "cmake", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Debug", "--log-level=WARNING",
        f"-DCMAKE_CXX_FLAGS_DEBUG={flags}", "-DTORCHOPT_CUDA=OFF", "-DTORCHOPT_TESTS=ON",
        f"-DPython_EXECUTABLE={PYTHON}", f"-Dpybind11_DIR={pybind11}", "-S", TORCHOPT,
        "-B", build)  # fmt: skip
    run(session, "cmake", "--build", build, "--parallel", "2", "--", "--quiet")
    run(session, "ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error",
        ASAN_OPTIONS="detect_leaks=0")  # fmt: skip
    shutil.rmtree(site, ignore_errors=True)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(ROOT / ".venv")}))
    ignore = shutil.ignore_patterns("_C*.so", "__pycache__")
    for package in (OPTREE, TORCHOPT):
        shutil.copytree(package / "src" / package.name, site / package.name, ignore=ignore)
    for extension in (purelib / "optree").glob("_C*.so"):
        shutil.copy2(extension, site / "optree")
    run(session, "cmake", "--install", build, "--prefix", site)
    # Tests that start a compiler are left out: it is not instrumented.
    tests = [f"packages/torchopt/tests/kernels/{name}" for name in KERNEL_TESTS]
    _run_instrumented(session, site, session.posargs or [*tests, "-k", "not compiles"])


@nox.session
def compiled(session: nox.Session) -> None:
    """Compile inner loops of every kind and with every optimizer (opt-in, half an hour)."""
    run(session, PYTHON, "-m", "pytest", "-m", "exhaustive", *session.posargs, **QUIET)


@nox.session
def free_threaded(session: nox.Session) -> None:
    """Test optree without the interpreter lock, on a CPython built for it (opt-in, minutes)."""
    run(session, PYTHON, "tools/free_threaded.py", *session.posargs, **QUIET)


@nox.session
def demo(session: nox.Session) -> None:
    """Learn to learn digits, time a meta-step beside jax's, and trees against other libraries."""
    out = () if "--out" in session.posargs else ("--out", "demo_out")
    learned, timed = "packages/torchopt/examples/maml_digits.py", "benchmarks.optree.demo_table"
    run(session, PYTHON, learned, *out, *session.posargs, **QUIET)
    steps = ("-m", "benchmarks.torchopt.meta_steps", "--rows", "maml sgd", "--threads", "1")
    run(session, PYTHON, *steps, "--no-store", **QUIET)
    run(session, PYTHON, "-m", timed, *out, *session.posargs, **QUIET)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks and refresh tables and plots from their results."""
    run(session, PYTHON, "-m", "benchmarks", *session.posargs, **QUIET)


@nox.session
def instructions(session: nox.Session) -> None:
    """Compare the instruction counts of tree operations with the stored ones (needs valgrind)."""
    run(session, PYTHON, "-m", "benchmarks.optree.instructions", *(session.posargs or ["--check"]))


def manuals(session: nox.Session, builder: str, *options: str) -> None:
    """Install Sphinx and build both manuals with it."""
    tools = ("sphinx", "furo", "myst-parser", "sphinx-mathjax-offline")
    run(session, PYTHON, "-m", "pip", "install", "--quiet", "-c", "tools/constraints.txt", *tools)
    for package in (OPTREE, TORCHOPT):
        output = BUILD / "docs" / builder / package.name
        run(session, PYTHON, "-m", "sphinx", "--quiet", *options, "-b", builder,
            package / "docs", output)  # fmt: skip


@nox.session
def mutation(session: nox.Session) -> None:
    """Make small wrong changes, one at a time, and check that a test fails (about an hour)."""
    run(session, PYTHON, "-m", "pip", "install", "--quiet", "-c", "tools/constraints.txt",
        "cosmic-ray")  # fmt: skip
    run(session, PYTHON, "tools/mutation.py", *session.posargs)


@nox.session
def calls(session: nox.Session) -> None:
    """Run a test of each public function with a profiler, and check that it is called (minutes)."""
    run(session, PYTHON, "tools/record_calls.py", *session.posargs, **QUIET)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation of both packages and run its examples; warnings are errors."""
    manuals(session, "html", "-W", "--keep-going")
    for package in (OPTREE, TORCHOPT):
        tests = package / "tests" / "test_documentation.py"
        run(session, PYTHON, "-m", "pytest", "-q", tests, **QUIET)


@nox.session
def links(session: nox.Session) -> None:
    """Check the external links of the documentation (needs a network)."""
    manuals(session, "linkcheck")


WHEELHOUSE = ROOT / "wheelhouse"


@nox.session
def wheels(session: nox.Session) -> None:
    """Build sdists, and wheels from them, into ``wheelhouse/``; check them, print sizes."""
    shutil.rmtree(WHEELHOUSE, ignore_errors=True)
    run(session, PYTHON, "-m", "pip", "install", "--quiet", "twine", "auditwheel")
    for package in (OPTREE, TORCHOPT):
        run(session, PYTHON, "-m", "build", "--no-isolation", "--outdir", WHEELHOUSE, package)
    files = sorted(WHEELHOUSE.iterdir())
    run(session, PYTHON, "-m", "twine", "check", "--strict", *files)
    for wheel in WHEELHOUSE.glob("*.whl"):
        if wheel.name.endswith("-none-any.whl"):
            session.error(f"expected a wheel with compiled code, got {wheel.name}")
        if "linux" in wheel.name:
            run(session, PYTHON, "-m", "auditwheel", "show", wheel)
    for path in files:
        print(f"{path.stat().st_size / 1000:10.1f} kB  {path.name}")


def install_alone(session: nox.Session, *packages: str) -> None:
    """Install wheels into this session's empty environment and check that they are compatible."""
    session.chdir(ROOT)
    session.install("--quiet", "-c", "tools/constraints.txt", "torch", *packages)
    session.run("python", "-m", "pip", "check")
    where = "import optree, torchopt; print(optree.__file__, torchopt.__file__)"
    printed = session.run("python", "-I", "-c", where, silent=True)
    if str(ROOT / "packages") in str(printed):
        session.error(f"expected the installed packages, got {printed}")


def built(pattern: str) -> str:
    """Return the one wheel of this name in ``wheelhouse/``."""
    found = sorted(WHEELHOUSE.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(
            f"expected one {pattern} in {WHEELHOUSE}, found {len(found)}; run `wheels` first"
        )
    return str(found[0])


INSTALLED = ("python", "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider")


@nox.session(venv_backend="venv")
def wheel_tests(session: nox.Session) -> None:
    """Install the wheels of ``wheelhouse/`` into an empty environment and run the tests there.

    All requirements of the tests come from the extra ``test`` of each wheel.
    """
    wheels = [built(f"{name}-*.whl") + "[test]" for name in ("optree", "torchopt")]
    install_alone(session, *wheels)
    tests = session.posargs or ["packages/optree/tests", "packages/torchopt/tests"]
    session.run(*INSTALLED, *tests, env=QUIET)


PURE_TESTS = ("optim", "transform", "linear_solve", "diff/implicit", "test_closed_forms.py")


@nox.session(venv_backend="venv")
def pure_wheel(session: nox.Session) -> None:
    """Build torchopt without its kernels and test its results in pure PyTorch."""
    place = BUILD / "pure"
    shutil.rmtree(place, ignore_errors=True)
    run(session, PYTHON, "-m", "build", "--no-isolation", "--wheel", "--outdir", place, TORCHOPT,
        TORCHOPT_NO_EXTENSIONS="1")  # fmt: skip
    (wheel,) = place.glob("*-none-any.whl")
    install_alone(session, built("optree-*.whl"), f"{wheel}[test]")
    program = (
        "import torch, torchopt; w = torch.ones(2, requires_grad=True); "
        "o = torchopt.Adam([w], lr=0.5); (w ** 2).sum().backward(); o.step(); "
        "assert abs(w[0].item() - 0.5) < 1e-6 and not torchopt.accelerated_op_available('cpu')"
    )
    session.run("python", "-I", "-c", program)
    # The package warns about it: with warnings as errors, the same program fails.
    session.run("python", "-I", "-W", "error", "-c", program, success_codes=[1], silent=True)
    said = "ignore::torchopt.errors.MissingExtensionWarning"
    tests = session.posargs or [f"packages/torchopt/tests/{name}" for name in PURE_TESTS]
    session.run(*INSTALLED, "-W", said, *tests, env=QUIET)


@nox.session(venv_backend="venv")
def differential(session: nox.Session) -> None:
    """Run the same thousands of programs in optree and in the published optree 0.20.0 (opt-in)."""
    session.chdir(ROOT)
    session.install("--quiet", "optree==0.20.0")
    published = shutil.which("python", path=session.bin) or "python"
    run(session, PYTHON, "tools/compare_published.py", "--published", published, *session.posargs)


@nox.session(venv_backend="venv")
def clients(session: nox.Session) -> None:
    """Run Keras' tree tests and the published torchopt on optree (downloads both; opt-in)."""
    tests = "packages/optree/tests"
    session.chdir(ROOT)
    session.install("--quiet", "keras==3.15.1", "jax", "pytest", "hypothesis", str(OPTREE))
    session.run("pytest", "-q", "--keras", f"{tests}/test_keras_client.py", env=QUIET)
    session.install("--quiet", "torch==2.13.0", "numpy", "graphviz")
    session.install("--quiet", "--no-deps", "torchopt==0.7.3")
    session.run("pytest", "-q", f"{tests}/test_published_torchopt_client.py", env=QUIET)


OPTREE_PYTHONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14", "3.15")


def find_python(version: str) -> str | None:
    """Return the path of a Python of this version, or None if PATH has none that runs."""
    question = "import sys; print('{}.{}'.format(*sys.version_info))"
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        python = shutil.which(f"python{version}", path=folder)
        if python is None:
            continue
        # Version managers have shims for inactive versions too; those fail.
        answer = subprocess.run([python, "-c", question], capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip() == version:
            return python
    return None


@nox.session
def optree_pythons(session: nox.Session) -> None:
    """Build and test optree on every supported Python on PATH; ``-- 3.9 3.12`` selects versions."""
    results: dict[str, str] = {}
    session.chdir(ROOT)
    for version in session.posargs or OPTREE_PYTHONS:
        python = find_python(version)
        if python is None:
            results[version] = "not found on PATH"
            continue
        place = BUILD / "pythons" / version
        inside = str(place / ("Scripts" if os.name == "nt" else "bin") / "python")
        try:
            session.run(python, "-m", "venv", "--clear", place, external=True)
            session.run(inside, "-m", "pip", "install", "--quiet", f"{OPTREE}[test]", external=True)
            session.run(
                inside, "-m", "pytest", "-q", "packages/optree/tests", external=True, env=QUIET
            )
            results[version] = "passed"
        except nox.command.CommandFailed:
            results[version] = "FAILED"
    for version, result in results.items():
        print(f"Python {version:5} {result}")
    required = session.posargs or [v for v in OPTREE_PYTHONS if results[v] != "not found on PATH"]
    if any(results[version] != "passed" for version in required) or not required:
        session.error("not every Python passed")
