# SPDX-License-Identifier: Apache-2.0
"""The memory through which the processes of a machine exchange numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from torchopt.distributed.board import Board, Counter, Messages, _seen
from torchopt.distributed.folder import has_locks


def test_ranks_check_that_all_start_the_same_operation(tmp_path):
    ranks = [Messages(tmp_path / "messages", rank, 3) for rank in range(3)]
    largest = 2**32 - 1
    for k, rank in enumerate(ranks):
        rank.tell(largest)
        assert [x.are_common() for x in ranks[: k + 1]] == [True if k == 2 else None] * (k + 1)
    ranks[0].tell(1)
    assert ranks[0].are_common() is None  # the others are at the previous message
    assert ranks[1].are_common() is True
    ranks[1].tell(1)
    ranks[2].tell(2)
    assert [x.are_common() for x in ranks] == [False] * 3
    for rank in ranks:
        rank.tell(3, [1.0] * (2 + (rank is ranks[0])))
    assert [x.are_common() for x in ranks] == [False] * 3  # of other lengths


def test_numbers_of_all_ranks_are_summed(tmp_path):
    own, other = (Messages(tmp_path / "messages", rank, 2) for rank in (0, 1))
    full = torch.arange(own.room - 2.0, dtype=torch.float64)
    assert own.tell(5, [1.0, float("inf")], [full]) == 8 * own.room
    other.tell(5, [2.0, 0.0], [full[:10], full[10:]])
    own.tell(6, [7.0])  # a rank that is ahead does not overwrite what the other has not read
    assert other.are_common() is True
    assert other.sums().tolist() == [3.0, float("inf"), *(2 * full).tolist()]
    other.tell(6, [8.0])
    assert (own.sums().tolist(), other.sums().tolist()) == ([15.0], [15.0])


def test_a_message_whose_parts_have_not_all_arrived_is_not_read(tmp_path):
    own, other = (Messages(tmp_path / "messages", rank, 2) for rank in (0, 1))
    other.tell(5, [2.0, 3.0])
    own.tell(5, [1.0, 1.0])
    other._numbers[1, 1, 1] = 4.0
    assert own.are_common() is None
    other._numbers[1, 1, 1] = 3.0
    assert own.are_common() is True


@pytest.mark.skipif(not has_locks(), reason="locks of POSIX")
def test_each_number_of_a_counter_is_drawn_once(tmp_path):
    path = tmp_path / "counter"
    first, second = Counter(path), Counter(path)
    assert [first.draw(7, 2), second.draw(7, 3), first.draw(7, 1)] == [0, 2, 5]
    assert [second.draw(8, 1), first.draw(8, 1)] == [0, 1]  # another purpose starts again

    def draws(number: int) -> list[int]:
        own = Counter(path)
        found = [own.draw(9, 1) for _ in range(3000)]
        return [x for x in found if x is not None]

    with ThreadPoolExecutor(4) as pool:
        drawn = [x for found in pool.map(draws, range(4)) for x in found]
    assert sorted(drawn) == list(range(len(drawn)))
    assert len(drawn) > 3000


@pytest.mark.skipif(not has_locks(), reason="locks of POSIX")
def test_a_counter_waits_while_another_rank_draws(tmp_path):
    import fcntl

    path = tmp_path / "counter"
    own, other = Counter(path), os.open(path, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert own.draw(1, 1) is None
    os.close(other)  # as at the end of its process
    assert own.draw(1, 1) == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux who is stopped")
def test_only_stopped_processes_of_the_world_are_killed(tmp_path):
    own = Board(tmp_path, 0)
    stopped, running, stranger = (subprocess.Popen(["sleep", "300"]) for _ in range(3))
    try:
        for rank, process in enumerate((stopped, running, stranger), 1):
            noted = " ".join(_seen(process.pid))
            if process is stranger:  # it has the number of a process that has ended
                noted = noted.rpartition(" ")[0] + " 1"
            (tmp_path / f"doing.{rank}").write_bytes(bytes(256) + noted.encode())
        for process in (stopped, stranger):
            process.send_signal(signal.SIGSTOP)
            while _seen(process.pid)[0] != "T":
                time.sleep(0.01)
        own.end_stopped(range(9))
        assert stopped.wait(60.0) == -signal.SIGKILL
        assert [own.was_ended(rank) for rank in (1, 2, 3)] == [True, False, False]
        assert _seen(running.pid)[0] != "Z"
        assert _seen(stranger.pid)[0] == "T"
    finally:
        for process in (stopped, running, stranger):
            process.kill()
            process.wait()


def test_a_process_reads_the_note_of_another(tmp_path):
    own, other = Board(tmp_path, 0), Board(tmp_path, 1)
    assert other.read(0) is None
    own.write("task 1 of 2")
    own.write("x" * 300)
    assert other.read(0) == "x" * 255
    own.write("after")
    assert other.read(0) == "after"
    assert other.read(5) is None
