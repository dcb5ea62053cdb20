# SPDX-License-Identifier: Apache-2.0
"""Processes that raise, hang, are killed or stopped: what is reported, and how runs continue."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import sys
import threading
import time
from pathlib import Path

import checkpoint_programs
import distributed_programs as programs
import pytest
import torch
from ahead import ahead, ends_of, free_port, in_world, reports, started, told_of

import torchopt.distributed as todist
from torchopt.errors import WorkerError

# How often the checkpoint tests kill a process; the full number is TORCHOPT_KILLS=20.
KILLS = int(os.environ.get("TORCHOPT_KILLS", "2"))


@ahead(lambda folder: told_of(folder, programs.collective_fault, 3, "raise", 1))
def test_a_task_that_raises_is_reported_on_every_rank_and_the_world_continues(made):
    ended, told = made
    assert ended is None
    assert sorted(told) == [0, 1, 2]
    for (rank, task, kind, trace, kinds), kept, again in told.values():
        assert (rank, task, kind) == (1, "task 2 of 4", "raised")
        assert "LookupError: bad task" in trace
        assert "in loss" in trace
        assert "LookupError" in kinds
        assert kept == 5.0  # a failed step leaves no gradient behind
        assert again == 2.5


@pytest.mark.parametrize("victim", [1, 0])
@ahead(lambda folder, victim: told_of(folder, programs.collective_fault, 3, "kill", victim))
def test_the_others_name_a_killed_process(made, victim):
    ended, told = made
    assert ended.rank == victim
    assert sorted(told) == sorted({0, 1, 2} - {victim})
    for (rank, task, kind, _, _), kept, _ in told.values():
        assert (rank, kind) == (victim, "lost")
        if victim != 0:  # rank 0 knows what the others do
            assert task == "task 2 of 4"
        assert kept == 5.0


@ahead(lambda folder: told_of(folder, programs.collective_fault, 3, "hang", 1))
def test_a_process_that_hangs_reports_where(made):
    ended, told = made
    assert ended.rank == 1
    assert sorted(told) == [0, 2]
    for (rank, task, kind, trace, _), _, _ in told.values():
        assert (rank, task, kind) == (1, "task 2 of 4", "timed out")
        assert "in wait_here" in trace


@ahead(lambda folder: told_of(folder, programs.collective_fault, 3, "stop", 1))
def test_a_process_that_does_not_even_answer_is_named(made):
    ended, told = made
    assert "this run is over" in str(ended)
    assert sorted(told) == [0, 2]
    for (rank, task, kind, trace, _), _, _ in told.values():
        assert (rank, task, kind, trace) == (1, "task 2 of 4", "timed out", "")


@pytest.mark.parametrize("victim", [1, 0])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("stop", "timed out"),
        ("stuck", "timed out"),
        ("kill", "lost"),
        ("fewer steps", "left"),
        ("exit", "left"),
        ("exit in task", "raised"),
        ("leave in task", "lost"),
        ("kill in backward", "lost"),
    ],
)
@ahead(
    lambda folder, kind, told, victim: told_of(folder, programs.fault_elsewhere, 3, kind, victim)
)
def test_the_others_name_every_fault(made, kind, told, victim):
    _, found = made
    assert sorted(found) == sorted({0, 1, 2} - {victim})
    own = {0: "task 1 of 4", 1: "task 2 of 4"}[victim]
    for rank, task, how, trace, _ in found.values():
        assert (rank, how) == (victim, told)
        if kind in ("exit in task", "leave in task", "kill in backward"):
            assert task == own
        elif kind != "exit":
            assert task == "after step 2"
        if kind == "stuck":
            assert "in wait_here" in trace
        if kind == "exit in task":
            assert "SystemExit: 3" in trace


def stopped_by_hand(folder: Path, stopped: tuple[int, ...]) -> tuple[list[int | None], dict]:
    """Return the exit codes of a world in which some processes stop, and the others' reports.

    There is no launcher, because torchrun would wait half a minute for an answer to SIGTERM.
    """
    size, port = 2 + len(stopped), free_port()
    arguments = [(rank, size, port, str(folder / "report"), stopped) for rank in range(size)]
    return ends_of(programs.started_by_hand, arguments), reports(folder)


@pytest.mark.parametrize("stopped", [(1,), (0,), (0, 2)])
@ahead(stopped_by_hand)
def test_the_processes_that_name_a_stopped_one_kill_it(made, stopped):
    ends, found = made
    assert ends == [-signal.SIGKILL if rank in stopped else 1 for rank in range(len(ends))]
    assert {*found} == {*range(len(ends))} - {*stopped}
    for rank, task, how, _, _ in found.values():
        assert rank in stopped
        assert (task, how) == ("after step 2", "timed out")


@ahead(lambda folder: in_world(programs.suspended, 3))
def test_a_suspended_world_continues_afterwards(made):
    assert made == [[600.0] * 4] * 3


@pytest.mark.parametrize("kind", ["tasks", "end"])
@ahead(lambda folder, kind: in_world(programs.slow_but_alive, 2, kind))
def test_the_others_wait_for_a_slow_process_that_is_alive(made, kind):
    for rank, result in enumerate(made):
        assert result == (pytest.approx(4.5), rank)


def in_their_own_world(folder: Path, apart: bool) -> list:
    return in_world(programs.users_own_world, 2, str(folder / "store") if apart else None)


@pytest.mark.parametrize("apart", [False, True], ids=["one machine", "two"])
@ahead(in_their_own_world)
def test_a_world_that_the_program_opened_itself(made, apart):
    for loss, grad, failed in made:
        assert loss == 4.5
        assert grad == 1.5
        assert failed == (0, "task 1 of 2", "raised")


@pytest.mark.parametrize("late", [0, 1])
@ahead(lambda folder, late: in_world(programs.late_in_their_own_world, 2, late, str(folder)))
def test_a_rank_that_is_late_for_the_first_engine_is_named(made, late):
    told, nothing = made if late == 1 else made[::-1]
    assert f"within 0.5 s, ranks [{late}] are missing" in told[0]
    assert nothing[0] == ""
    assert told[1] == nothing[1] == 1.5 * 3


@ahead(lambda folder: in_world(programs.sub_groups, 4))
def test_sub_groups_name_ranks_as_the_world_does(made):
    *first, third, fourth = made
    assert first == [((0, 1), (0, 1))] * 2
    assert third == fourth == ((2, 3), (3, "task 2 of 2", "raised"))


def spawning_and_ended(folder: Path, how: signal.Signals, forks: bool) -> tuple[bool, bool]:
    """Return whether the workers and the folder go long before anything else would end them."""
    with started(programs.spawning, [(str(folder), forks)]) as (parent,):
        alive = [folder / f"alive.{rank}" for rank in range(3)]
        forked = [folder / "forked"] if forks else []
        try:
            assert waited(lambda: all(map(Path.exists, [*alive, *forked])))
        finally:
            os.kill(parent.pid, how)
        pids = [int(path.read_text()) for path in alive]
        are_gone = waited(lambda: not any(map(runs, pids)), programs.PATIENCE / 4)
        is_removed = waited(lambda: not list(folder.glob("torchopt-*")), programs.PATIENCE / 4)
        for path in forked:
            assert runs(int(path.read_text()))
            os.kill(int(path.read_text()), signal.SIGKILL)
        return are_gone, is_removed


@pytest.mark.parametrize(("how", "forks"), [(signal.SIGTERM, False), (signal.SIGKILL, True)])
@ahead(spawning_and_ended)
def test_workers_end_with_the_process_that_spawned_them(made, how, forks):
    """Both processes that wait and processes that hang, also if a child of it lives on."""
    assert made == (True, True)


def waited(condition, seconds=programs.PATIENCE):
    """Wait until a condition holds; return whether it does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@ahead(lambda folder: told_of(folder, programs.remote_death, 3))
def test_a_killed_worker_of_remote_calls_is_named_and_the_others_continue(made):
    ended, found = made
    assert ended.rank == 1
    (rank, task, kind, _, _), still, seconds = found[0]
    assert (rank, task, kind) == (1, "task 1 of 1 (die)", "lost")
    assert still == [3]
    assert seconds < 60.0  # not the time limit of the call


def kill_at_random(
    folder: Path, chance: random.Random, attempt: int, size: int, part: Path | None
) -> threading.Event:
    """Kill one of the processes of an attempt, some steps and some milliseconds into it.

    Args:
        folder: The folder with their ids and steps.
        chance: Chooses the process, the step and the moment.
        attempt: Number of the attempt.
        size: Number of processes.
        part: A file that exists while a checkpoint is written, which is the moment to kill; None:
            any moment.

    Returns:
        An event to set when it is too late to kill.
    """
    victim, after, late = chance.randrange(size), chance.randrange(1, 4), chance.uniform(0.0, 0.03)
    pid, progress = folder / f"pid.{attempt}.{victim}", folder / f"progress.{attempt}"
    over = threading.Event()

    def kill() -> None:
        while not over.is_set():
            steps = progress.stat().st_size if progress.exists() else 0
            if pid.exists() and steps >= after and (part is None or part.exists()):
                time.sleep(late if part is None else late / 30)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid.read_text()), signal.SIGKILL)
                return
            time.sleep(0.002 if part is None else 0.0002)

    threading.Thread(target=kill).start()
    return over


def killed(folder, program, sizes, part=None) -> int:
    """Kill runs that continue each other; return the number of steps in the checkpoint."""
    broken, chance = folder / "broken", random.Random(f"{program.__name__} {part}")
    for attempt in range(KILLS):
        environment = {"ATTEMPT": str(attempt), "PROGRESS": str(folder)}
        size = sizes[attempt % len(sizes)]
        over = kill_at_random(folder, chance, attempt, size, part and broken / part)
        try:
            with pytest.raises(WorkerError):
                in_world(program, size, str(broken), 10**6, env=environment)
        finally:
            over.set()
    done = todist.Checkpoint(broken / "state.pt").load()
    return 0 if done is None else done[0]


def broken_and_whole(folder, program, sizes, whole, end, part=None):
    """Return the results by rank of a run that is killed repeatedly, and of an undisturbed run.

    Args:
        folder: The folder of both.
        program: The program.
        sizes: Numbers of processes, used in turn; each attempt continues the previous one.
        whole: Number of processes of the undisturbed run.
        end: Number of processes that end the run that was killed.
        part: See `kill_at_random`.
    """
    steps = killed(folder, program, sizes, part) + 2
    want = in_world(program, whole, str(folder / "whole"), steps)[0]
    return in_world(program, end, str(folder / "broken"), steps), want


def assert_same_bits(results, want):
    start = [p.detach() for p in programs.make_net().parameters()]
    for result in results:
        for got, expected, first in zip(result, want, start):
            assert torch.equal(got, expected)
            assert not torch.equal(got, first)


@pytest.mark.parametrize(
    ("program", "part"),
    [
        (programs.checkpointed, None),
        (programs.checkpointed, "state.pt.part"),
        (programs.checkpointed_now_and_then, None),
    ],
    ids=["at any moment", "in a checkpoint", "with steps after it"],
)
@ahead(lambda folder, program, part: broken_and_whole(folder, program, (3, 2), 1, 3, part))
def test_a_run_that_is_killed_repeatedly_ends_like_an_undisturbed_one(made, program, part):
    assert_same_bits(*made)  # the gradients are deterministic


@ahead(lambda folder: broken_and_whole(folder, checkpoint_programs.checkpointed_shards, (2,), 2, 2))
def test_a_run_that_is_killed_while_it_saves_shards_ends_like_an_undisturbed_one(made):
    assert_same_bits(*made)


def spawned(program, count: int, *args, seconds: float = programs.PATIENCE) -> str | list:
    """Return the error of `spawn`, or its results."""
    try:
        return todist.spawn(program, count, args, start_method="forkserver", timeout=seconds)
    except WorkerError as error:
        return f"{type(error).__mro__} {error}"


HALVES = [
    (signal.SIGKILL, 60.0, "killed by signal 9"),
    (signal.SIGSTOP, 1.0, "ranks [0] still run"),
]


@pytest.mark.parametrize(("how", "seconds", "words"), HALVES)
@ahead(lambda folder, how, seconds, words: spawned(programs.say_half, 1, how, seconds=seconds))
def test_a_process_that_sends_half_of_its_result_is_named(made, how, seconds, words):
    assert words in made


def test_worker_errors_can_be_sent_between_processes():
    error = WorkerError(3, "task 1 of 2", "raised", "Traceback: here")
    again = pickle.loads(pickle.dumps(error))
    assert (again.rank, again.task, again.kind) == (3, "task 1 of 2", "raised")
    assert str(again) == str(error)
    assert "rank 3 raised in task 1 of 2" in str(error)


def ends_of_spawn(folder: Path) -> list[str | list]:
    return [
        spawned(programs.fail, 2, "nowhere"),
        spawned(programs.die, 2),
        spawned(programs.wait_here, 1, 1000.0, seconds=0.5),
        spawned(programs.leave_without_a_word, 1),
        spawned(sys.exit, 1),
    ]


@ahead(ends_of_spawn)
def test_spawn_names_the_process_that_failed(made):
    *failed, exited = made
    for told, words in zip(
        failed,
        ("rank 0 raised", "killed by signal 9", "ranks [0] still run", "code 0"),
        strict=True,
    ):
        assert words in told
    assert "LookupError" in failed[0]
    assert exited == [None]
    with pytest.raises(ValueError, match="at least 1"):
        todist.spawn(programs.die, 0)
    with pytest.raises(TypeError, match=r"`args`: expected a tuple .*, got int; .* \(x,\)"):
        todist.spawn(print, 1, 3)
