# SPDX-License-Identifier: Apache-2.0
"""Run the work of several tests at once: most processes of a fault only wait and use no core."""

from __future__ import annotations

import ast
import contextlib
import multiprocessing
import multiprocessing.connection
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed_programs import PATIENCE

import torchopt.distributed as todist
from torchopt.distributed import launch
from torchopt.errors import WorkerError

AT_ONCE = 4


def ahead(work: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a decorator of a test whose argument `made` is the result of `work`.

    The work runs beside that of other tests.

    Args:
        work: Takes its own folder, then the parameters of the test by name.
    """

    def mark(test: Any) -> Any:
        test.ahead = work
        return test

    return mark


class Ahead:
    """The work of the selected tests.

    Args:
        request: The request of a fixture.
        make_folder: Returns a new folder.
    """

    def __init__(self, request: Any, make_folder: Callable[[], Path]) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._begun: dict[str, Future[Any]] = {}
        for item in request.session.items:
            work = getattr(getattr(item, "function", None), "ahead", None)
            if work is not None:
                parameters = item.callspec.params if hasattr(item, "callspec") else {}
                begun = self._pool.submit(work, make_folder(), **parameters)
                self._begun[item.nodeid] = begun

    def result(self, item: pytest.Item) -> Any:
        """Return the result of a test's work, or raise its error."""
        return self._begun[item.nodeid].result()

    def end(self) -> None:
        """Wait for all work that has begun."""
        self._pool.shutdown(cancel_futures=True)


def in_world(
    program: Callable[..., Any],
    size: int,
    *args: Any,
    env: dict[str, str] | None = None,
    seconds: float = PATIENCE,
) -> list[Any]:
    """Run a program in its own world and return the results of its processes by rank."""
    return todist.spawn(program, size, args, env=env, start_method="forkserver", timeout=seconds)


def reports(folder: Path) -> dict[int, Any]:
    """Return the reports of the surviving ranks, by rank."""
    found = folder.glob("report.*")
    return {int(path.suffix[1:]): ast.literal_eval(path.read_text()) for path in found}


def told_of(
    folder: Path, program: Callable[..., Any], size: int, *args: Any
) -> tuple[WorkerError | None, dict[int, Any]]:
    """Return how a world ended, and the reports of the surviving ranks."""
    try:
        in_world(program, size, *args, env={"FAULT_REPORT": str(folder / "report")})
    except WorkerError as error:
        return error, reports(folder)
    return None, reports(folder)


def free_port() -> int:
    """Return a free port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextlib.contextmanager
def started(target: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """Start processes without `spawn`, one for each entry of `arguments`; kill the rest at exit."""
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=target, args=args) for args in arguments]
    try:
        for each in processes:
            with launch._polling:
                each.start()
        yield processes
    finally:
        for each in processes:
            if each.pid is not None:
                each.kill()


def ends_of(target: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Return the exit codes of processes started without `spawn`."""
    with started(target, arguments) as processes:
        return codes_of(processes)


def codes_of(processes: Sequence[Any]) -> list[int | None]:
    """Wait for the end of processes; return their exit codes."""
    until = time.monotonic() + PATIENCE
    for each in processes:
        multiprocessing.connection.wait([each.sentinel], max(0.0, until - time.monotonic()))
    with launch._polling:
        return [each.exitcode for each in processes]
