# SPDX-License-Identifier: Apache-2.0
"""Save time at the first call of a compiled graph.

The C++ code of a graph is compiled and loaded in a thread, while Python goes on with other work.
The C++ compiler is another process, so it takes none of the time in which Python traces the next
graph.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

__all__: list[str] = []

Made = TypeVar("Made")
_patching = threading.RLock()


class Job(Generic[Made]):
    """A call in a thread of its own.

    Who needs its value repeats the call if it failed there, or if the process was forked meanwhile.

    Args:
        make: The function that is called.
    """

    def __init__(self, make: Callable[[], Made]) -> None:
        self._make, self._context = make, contextvars.copy_context()
        self.found: list[Made] = []  # the value, once there is one
        self._thread = threading.Thread(target=self._tried, name="torchopt: C++ compiler")
        self._thread.start()

    def _tried(self) -> None:
        with contextlib.suppress(Exception):
            self._call()

    def _call(self) -> None:
        # A context can be entered once at a time, and a fork may leave it entered.
        self.found.append(self._context.copy().run(self._make))

    def wait(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def result(self) -> Made:
        """Return the value, or raise what the call raises."""
        self.wait()
        if not self.found:
            self._call()
        return self.found[0]


@contextlib.contextmanager
def code_in_threads() -> Iterator[list[Job[Any]]]:
    """Within, inductor compiles and loads C++ wrappers in threads; yield the list of their jobs.

    A graph that is compiled within can be called, and then waits for its job.
    """
    from torch._inductor.codecache import CppWrapperCodeCache

    jobs: list[Job[Any]] = []
    here, load = threading.get_ident(), CppWrapperCodeCache.load_pybinding

    def started(*args: Any, **options: Any) -> Callable[..., Any]:
        if threading.get_ident() != here:
            found: Callable[..., Any] = load(*args, **options)
            return found
        job = Job(functools.partial(_loaded, *args, **options))
        jobs.append(job)
        return lambda handles: (job.found[0] if job.found else job.result())(handles)

    with _patching:
        cache: Any = CppWrapperCodeCache
        cache.load_pybinding = started
        try:
            yield jobs
        finally:
            del cache.load_pybinding  # which it inherits


@contextlib.contextmanager
def patterns_unloaded() -> Iterator[None]:
    """Within, inductor does not load its patterns of attention for graphs of this thread.

    It would load them for its first graph in each process, by tracing each, even if all else is in
    its cache.
    """
    from torch._inductor.fx_passes import joint_graph

    passes: Any = joint_graph
    here, load = threading.get_ident(), passes.lazy_init

    def elsewhere(*args: Any, **options: Any) -> None:
        if threading.get_ident() != here:
            load(*args, **options)

    with _patching:
        passes.lazy_init = elsewhere
        try:
            yield
        finally:
            passes.lazy_init = load


def _loaded(*args: Any, **options: Any) -> Any:
    """Return the entry of a C++ wrapper; compile it unless the cache of files has it.

    In any case inductor would prepare the header for the compiler first.
    """
    # Nobody reads the warnings about torch's headers, and it takes time to write them.
    options["extra_flags"] = (*options.get("extra_flags", ()), "-w")
    compiling, reading = _caches()
    missing: list[Any] = []
    found = reading.load_pybinding_async(*args, submit_fn=missing.append, **options)
    return compiling.load_pybinding(*args, **options) if missing else found()


@functools.cache
def _caches() -> tuple[Any, Any]:
    """Return two classes with the same files: one that compiles, and one that need not."""
    from torch._inductor.codecache import CppWrapperCodeCache

    class Compiling(CppWrapperCodeCache):
        """Compiles with the headers of wrappers and of kernels in one precompiled header."""

        cache: dict[str, Any] = {}  # noqa: RUF012 - as in torch

        @classmethod
        def _get_uncompiled_header(cls, device: str) -> str | None:
            first = super()._get_uncompiled_header(device)
            return f"{first}>\n#include <torch/csrc/inductor/cpp_prefix.h"  # goes between <>

    class Reading(Compiling):
        cache: dict[str, Any] = {}  # noqa: RUF012 - as in torch

        @classmethod
        def _get_uncompiled_header(cls, device: str) -> str | None:
            return None

    return Compiling, Reading
