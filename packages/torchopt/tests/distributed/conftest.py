# SPDX-License-Identifier: Apache-2.0
"""Worlds of real processes on the loopback interface, started from a process that has torch.

No test waits longer than `distributed_programs.PATIENCE` seconds, those of the grids three times as
long, and none chooses a port.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Processes are forked from one that has finished all imports, including those that torch and
# torchopt do at first use, so that a start takes 20 ms instead of 3 s.
multiprocessing.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.profiler._cupti_monitor",
        "all_of_torchopt",
        *(path.stem for path in Path(__file__).parent.glob("*_programs.py")),
        "frozen",
    ]
)


@pytest.fixture(scope="session", autouse=True)
def _no_folder_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Check that no world leaves files behind, however it ends."""
    temporary = tmp_path_factory.mktemp("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", str(temporary))
        yield
    assert list(temporary.glob("torchopt-*")) == []


@pytest.fixture(scope="session", autouse=True)
def _server(_no_folder_is_left: None) -> None:
    """Start the process that others are forked from, in a place where it finds the programs.

    It imports torch while the first tests run, which need no other process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")  # the threads of a world of one would wait for cores
        forkserver.ensure_running()


_worlds: dict[tuple[int, str], Any] = {}


@pytest.fixture(scope="session")
def standing(_ahead: Any) -> Iterator[Callable[..., list[Any]]]:
    """Run a program in a world that remains open for the next tests."""

    def run(program: Callable[..., Any], size: int, *args: Any, backend: str = "gloo") -> list[Any]:
        return _run(program, [size], args, backend)[size]

    yield run
    _close_worlds()


@pytest.fixture(scope="session")
def standing_at_once(standing: Any) -> Callable[..., dict[int, list[Any]]]:
    """Run a program in worlds of several sizes at the same time; return the results by size."""
    del standing  # it closes the worlds

    def run(program: Callable[..., Any], sizes: Sequence[int], *args: Any) -> Any:
        return _run(program, sizes, args, "gloo")

    return run


def _run(
    program: Callable[..., Any], sizes: Sequence[int], args: tuple[Any, ...], backend: str
) -> dict[int, list[Any]]:
    from standing import Standing

    for size in sizes:
        if (size, backend) not in _worlds:
            _worlds[size, backend] = Standing(size, backend)
        _worlds[size, backend].start(program, *args)
    found: dict[int, list[Any]] = {}
    errors: list[BaseException] = []
    for size in sizes:
        try:
            found[size] = _worlds[size, backend].results()
        except BaseException as error:
            errors.append(error)
            with contextlib.suppress(BaseException):  # the next test gets another one
                _worlds.pop((size, backend)).close()
    if errors:
        raise errors[0]
    return found


def _close_worlds(backend: str = "") -> None:
    """Close the worlds of one backend, or all."""
    for key in [key for key in _worlds if backend in ("", key[1])]:
        _worlds.pop(key).close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests of this folder.

    First those that may change the environment and modules of this process: no work of others runs
    beside them; the last of them start processes. Then those in standing worlds, which compute
    while the work of others waits, the longest of them last. Then these others; the longest of
    their work begins first. Last the files with remote calls, whose threads poll and slow down
    other tests.
    """
    places = [k for k, x in enumerate(items) if Path(__file__).parent in x.path.parents]
    last = ("test_nothing_silent.py", "test_remote_calls.py", "test_world.py")
    long = ("test_checkpoint.py", "test_sharded.py")

    def order(item: pytest.Item) -> float:
        names = getattr(item, "fixturenames", ())
        if item.path.name in last:
            return 4
        if "standing" in names:
            return 2 if item.path.name in long else 1
        if "made" in names:
            return 2 if item.path.name in long else 3
        return 0.5 if item.path.name == "test_folder.py" else 0.0

    for k, item in zip(places, sorted((items[k] for k in places), key=order)):
        items[k] = item


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the worlds that no test of this folder uses next; remote calls are never idle."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _close_worlds()
    elif "standing" not in nextitem.fixturenames:
        _close_worlds("rpc")


@pytest.fixture
def world(_server: None) -> Callable[..., list[Any]]:
    """Run a program in its own world and return the results of its processes by rank."""
    from ahead import in_world

    return in_world


@pytest.fixture(scope="session")
def _ahead(request: Any, _server: None, tmp_path_factory: Any) -> Iterator[Any]:
    """Begin the work of all tests; most of it waits, while the other tests compute."""
    from ahead import Ahead

    begun = Ahead(request, lambda: tmp_path_factory.mktemp("ahead"))
    yield begun
    begun.end()


@pytest.fixture
def made(_ahead: Any, request: Any) -> Any:
    """Return the result of the test's work; see `ahead`."""
    return _ahead.result(request.node)
