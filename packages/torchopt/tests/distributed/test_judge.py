# SPDX-License-Identifier: Apache-2.0
"""The decision which process is at fault, from what is known about each."""

from __future__ import annotations

import time

from torchopt.distributed.clock import Clock
from torchopt.distributed.judge import Doing, View, judge

START = 1000.0


def view(kind: str, name: str, *, since: float, heard: float, limit: float = 1.0) -> View:
    """Return what is known about a process; times are relative to `START`."""
    found = View(START)
    found.doing = Doing(kind, name, limit, (0, 1, 2), START + since)
    found.heard = START + heard
    return found


def test_a_silent_process_is_at_fault_even_if_it_was_last_heard_in_the_operation():
    # Rank 1 was stopped in the task after its last heartbeat, which came from the previous step.
    for seconds in (1.1, 1.3, 1.6, 2.0):
        views = {
            0: view("operation", "the sum of step 2", since=0.0, heard=seconds),
            1: view("operation", "the sum of step 1", since=-0.2, heard=-0.1),
            2: view("operation", "the sum of step 2", since=0.0, heard=seconds - 0.1),
        }
        verdict = judge(views, START + seconds, 300.0, own=0)
        if verdict is not None:
            assert (verdict.rank, verdict.kind, verdict.silent) == (1, "timed out", True)
    assert verdict is not None


def test_no_rank_is_at_fault_if_all_are_in_an_operation_that_does_not_end():
    views = {
        rank: view("operation", "the sum of step 2", since=0.0, heard=1.9) for rank in range(3)
    }
    assert judge(views, START + 0.9, 300.0, own=0) is None
    verdict = judge(views, START + 2.0, 300.0, own=0)
    assert verdict is not None
    assert (verdict.rank, verdict.task) == (None, "the sum of step 2")


def test_a_clock_pauses_while_its_process_is_stopped(monkeypatch):
    now = START
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock(1.0)
    for step in (0.2, 0.9, 1.0):
        now += step
        clock.look()
    assert clock() == START + 2.1
    now += 500.0  # of these, the first second may have been a busy one
    clock.look()
    assert clock() == START + 3.1
    now += 0.5
    assert clock() == START + 3.6
