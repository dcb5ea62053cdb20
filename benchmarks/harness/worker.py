# SPDX-License-Identifier: Apache-2.0
"""One rival's process: prepares cases and times them on request.

Started as `python -m benchmarks.harness.worker SUITE RIVAL_MODULE`. Reads one JSON request a
line from standard input and writes one JSON reply a line to what was standard output; the
rival's own output goes to standard error.

A suite is a module with `prepare(rival, case) -> Prepared` and `describe(rival) -> dict`; the
latter gives `versions` by distribution and `file`, where the library was imported from.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import sys
import time
import timeit
import traceback
from typing import Any, Callable

from benchmarks.harness.case import Prepared, UnsupportedError

# Deep trees: the rivals in pure Python recurse several frames a level.
RECURSION_LIMIT = 50_000

# Memory that Python's allocator holds ready before anything is timed.
HELD_BYTES = 128 * 2**20


def _finest_timer() -> Callable[[], float]:
    """Return the clock to use: the processor time of this thread, if its resolution suffices.

    The timed statements neither wait nor use a second thread, so on an idle machine this is the
    elapsed time; on a busy one it excludes the time of other processes.
    """
    if time.get_clock_info("thread_time").resolution <= 1e-6:
        return time.thread_time
    return time.perf_counter


TIMER = _finest_timer()


def measure(
    prepared: Prepared, seconds: float, sample_seconds: float, collect: bool
) -> list[float]:
    """Return seconds per operation, one number per sample.

    Args:
        prepared: the case.
        seconds: time to spend, > 0; at least one sample is taken.
        sample_seconds: how long a sample of a repeatable statement should last, > 0.
        collect: whether the garbage collector is on while the statement runs.
    """
    clock = prepared.clock or TIMER
    timer = timeit.Timer(prepared.statement, timer=clock, globals=prepared.names)
    loops = 1 if prepared.renew else _loops(timer, sample_seconds)
    samples: list[float] = []
    deadline = time.perf_counter() + seconds
    while True:
        if prepared.renew:
            prepared.renew()
        if collect:
            gc.collect()
        samples.append(_time_once(timer, loops, collect) / (loops * prepared.repetitions))
        if time.perf_counter() >= deadline:
            return samples


def _loops(timer: timeit.Timer, sample_seconds: float) -> int:
    """Return how often to run the statement so that a sample lasts long enough."""
    loops = 1
    while True:
        taken = timer.timeit(loops)
        if taken >= sample_seconds / 2:
            return max(1, round(loops * sample_seconds / taken))
        loops *= 2 if taken > sample_seconds / 20 else 10


def _time_once(timer: timeit.Timer, loops: int, collect: bool) -> float:
    """Return the time of one sample. timeit switches the collector off; this undoes that."""
    if not collect:
        return timer.timeit(loops)
    inner = timer.inner  # type: ignore[attr-defined]  # the loop without the switch
    gc.enable()
    try:
        return float(inner(iter([None] * loops), timer.timer))  # type: ignore[attr-defined]  # ditto
    finally:
        gc.disable()


class Pace:
    """Waits until the processor runs at its usual speed.

    A virtual or frequency-scaled processor that was idle runs for tens of milliseconds at
    half its speed, and other guests can slow it down for as long. A fixed loop is run until its
    time is close to the shortest one in this process.
    """

    tolerance = 1.15
    patience = 0.25  # seconds; a machine that stays slow is measured as it is

    def __init__(self) -> None:
        self._timer = timeit.Timer("for _ in range(5000): pass", timer=TIMER)
        self._best = min(self._timer.repeat(200, 1))

    def wait(self) -> None:
        """Return once the processor is at full speed, or after `patience` seconds."""
        deadline = time.perf_counter() + self.patience
        while True:
            taken = min(self._timer.repeat(5, 1))
            self._best = min(self._best, taken)
            if taken <= self.tolerance * self._best or time.perf_counter() > deadline:
                return


def hold_arenas(held_bytes: int) -> list[bytes]:
    """Return objects that make Python's allocator keep this much memory.

    The allocator returns an arena to the system when its last object is freed. A benchmark whose
    objects just fill an arena would map it again in every run, which makes the same statement
    1.6 times slower in some processes than in others. One live object per 256 KiB, the size of
    the smallest arena, prevents that; the rest of the memory stays free.
    """
    block = 512
    objects = [bytes(block - 64) for _ in range(held_bytes // block)]
    return objects[:: 2**18 // block]


class Worker:
    """Answers requests about one rival."""

    def __init__(self, suite: Any, rival: Any) -> None:
        self._suite = suite
        self._rival = rival
        self._prepared: Prepared | None = None
        self._held: list[bytes] = []
        self._pace: Pace | None = None

    def describe(self) -> dict[str, Any]:
        """Return the rival's versions and where it was imported from."""
        return {"python": sys.version.split()[0], **self._suite.describe(self._rival)}

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        """Check the answer of a case, prepare it for timing, and return the answer's digest."""
        self._held = self._held or hold_arenas(HELD_BYTES)
        self._prepared = None
        gc.collect()
        self._prepared = prepared = self._suite.prepare(self._rival, case)
        gc.collect()
        clock = getattr(prepared.clock or TIMER, "__name__", "of the case")
        return {"digest": prepared.digest, "facts": {**prepared.facts, "clock": clock}}

    def measure(self, seconds: float, sample_seconds: float, collect: bool) -> dict[str, Any]:
        """Time the prepared case for a while."""
        if self._prepared is None:
            raise RuntimeError("expected a prepared case before a measurement; got none")
        self._pace = self._pace or Pace()
        self._pace.wait()
        samples = measure(self._prepared, seconds, sample_seconds, collect)
        return {
            "min": min(samples),
            "median": statistics.median(samples),
            "timings": len(samples),
        }

    def call(self, name: str, case: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a function of the suite for the rival and the case."""
        answer: dict[str, Any] = getattr(self._suite, name)(self._rival, case)
        return answer

    def drop(self) -> dict[str, Any]:
        """Forget the prepared case."""
        self._prepared = None
        gc.collect()
        return {}


def main() -> None:
    """Serve requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.setrecursionlimit(RECURSION_LIMIT)
    suite_name, rival_name = sys.argv[1:3]
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        try:
            if worker is None:
                suite = importlib.import_module(suite_name)
                worker = Worker(suite, importlib.import_module(rival_name))
                gc.disable()
            reply = {"ok": True, **getattr(worker, action)(**request)}
        except (UnsupportedError, NotImplementedError) as error:
            reply = {"ok": False, "kind": "unsupported", "reason": str(error)}
        except Exception as error:  # the parent process reports every failure
            reason = f"{type(error).__name__}: {error}"
            trace = traceback.format_exc()
            reply = {"ok": False, "kind": "error", "reason": reason[:500], "trace": trace[-4000:]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
