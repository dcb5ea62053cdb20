# SPDX-License-Identifier: Apache-2.0
"""Processes that raise, hang, are killed or stopped: who is told what, and how runs continue."""

from __future__ import annotations

import ast
import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import threading
import time
from pathlib import Path

import checkpoint_programs
import distributed_programs as programs
import pytest
import torch

import torchopt.distributed as todist
from torchopt.distributed import launch
from torchopt.errors import WorkerError

# How often the checkpoint test kills; TORCHOPT_KILLS=20 for the full measure.
KILLS = int(os.environ.get("TORCHOPT_KILLS", "2"))


def reports(folder: Path) -> dict[int, tuple]:
    """Return what the ranks that survived have to say, by rank."""
    found = folder.glob("report.*")
    return {int(path.suffix[1:]): ast.literal_eval(path.read_text()) for path in found}


@pytest.fixture
def report(tmp_path):
    return {"FAULT_REPORT": str(tmp_path / "report")}


def test_a_task_that_raises_is_reported_on_every_rank_and_the_world_continues(
    world, report, tmp_path
):
    world(programs.collective_fault, 3, "raise", 1, env=report)
    told = reports(tmp_path)
    assert sorted(told) == [0, 1, 2]
    for (rank, task, kind, trace, kinds), kept, again in told.values():
        assert (rank, task, kind) == (1, "task 2 of 4", "raised")
        assert "LookupError: bad task" in trace
        assert "in loss" in trace
        assert "LookupError" in kinds
        assert kept == 5.0  # a failed step leaves no gradient behind
        assert again == 2.5


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_is_named_by_the_others(world, report, tmp_path, victim):
    with pytest.raises(WorkerError) as ended:
        world(programs.collective_fault, 3, "kill", victim, env=report)
    assert ended.value.rank == victim
    told = reports(tmp_path)
    assert sorted(told) == sorted({0, 1, 2} - {victim})
    for (rank, task, kind, _, _), kept, _ in told.values():
        assert (rank, kind) == (victim, "lost")
        if victim != 0:  # rank 0 is the one that knows what the others do
            assert task == "task 2 of 4"
        assert kept == 5.0


def test_a_process_that_hangs_says_where(world, report, tmp_path):
    with pytest.raises(WorkerError):
        world(programs.collective_fault, 3, "hang", 1, env=report)
    told = reports(tmp_path)
    assert sorted(told) == [0, 2]
    for (rank, task, kind, trace, _), _, _ in told.values():
        assert (rank, task, kind) == (1, "task 2 of 4", "timed out")
        assert "in wait_here" in trace


def test_a_process_that_does_not_even_answer_is_named(world, report, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_LAST_WORDS", 1.0)  # the stopped process has none
    with pytest.raises(WorkerError, match="this run is over"):
        world(programs.collective_fault, 3, "stop", 1, env=report)
    told = reports(tmp_path)
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
def test_every_fault_is_named_by_the_others(
    world, report, tmp_path, monkeypatch, kind, told, victim
):
    monkeypatch.setattr(launch, "_LAST_WORDS", 4.0)
    with contextlib.suppress(WorkerError):
        world(programs.fault_elsewhere, 3, kind, victim, env=report)
    found = reports(tmp_path)
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


def test_stopped_processes_are_ended_by_those_that_name_them(tmp_path):
    # No launcher is there, and torchrun would wait half a minute for an answer to SIGTERM.
    context = multiprocessing.get_context("forkserver")
    worlds = {}
    for stopped in ((1,), (0,), (0, 2)):
        size, folder = 2 + len(stopped), tmp_path / f"stopped {stopped}"
        folder.mkdir()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        arguments = (size, port, str(folder / "report"), stopped)
        worlds[stopped] = (
            folder,
            [
                context.Process(target=programs.started_by_hand, args=(rank, *arguments))
                for rank in range(size)
            ],
        )
    everyone = [each for _, processes in worlds.values() for each in processes]
    for each in everyone:
        each.start()
    try:
        for each in everyone:
            each.join(programs.PATIENCE)
        for stopped, (folder, processes) in worlds.items():
            others = {*range(len(processes))} - {*stopped}
            for rank, each in enumerate(processes):
                assert each.exitcode == (-signal.SIGKILL if rank in stopped else 1)
            found = reports(folder)
            assert {*found} == others
            for rank, task, how, _, _ in found.values():
                assert rank in stopped
                assert (task, how) == ("after step 2", "timed out")
    finally:
        for each in everyone:
            each.kill()


def test_a_world_that_is_suspended_goes_on_afterwards(world):
    assert world(programs.suspended, 3) == [[600.0] * 4] * 3


@pytest.mark.parametrize("kind", ["tasks", "end"])
def test_a_slow_process_that_lives_is_waited_for(world, kind):
    for rank, result in enumerate(world(programs.slow_but_alive, 2, kind)):
        assert result == (pytest.approx(4.5), rank)


def test_a_world_that_the_program_opened_itself(world):
    for loss, grad, failed in world(programs.users_own_world, 2):
        assert loss == 4.5
        assert grad == 1.5
        assert failed == (0, "task 1 of 2", "raised")


def test_sub_groups_name_ranks_as_the_world_does(world):
    *first, third, fourth = world(programs.sub_groups, 4)
    assert first == [((0, 1), (0, 1))] * 2
    assert third == fourth == ((2, 3), (3, "task 2 of 2", "raised"))


def test_workers_end_with_the_process_that_spawned_them(tmp_path):
    """Within a second: those that wait, and those that can do nothing any more."""
    context = multiprocessing.get_context("forkserver")
    folders = {how: tmp_path / how.name for how in (signal.SIGTERM, signal.SIGKILL)}
    parents = {}
    for how, folder in folders.items():
        folder.mkdir()
        parents[how] = context.Process(target=programs.spawning, args=(str(folder),))
        parents[how].start()
    for how, folder in folders.items():
        alive = [folder / f"alive.{rank}" for rank in range(3)]
        try:
            assert waited(lambda alive=alive: all(map(Path.exists, alive)))
        finally:
            os.kill(parents[how].pid, how)
        pids = [int(path.read_text()) for path in alive]
        assert waited(lambda pids=pids: not any(map(runs, pids)), 1.0)
        assert waited(lambda folder=folder: not list(folder.glob("torchopt-*")), 1.0)


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


def test_a_killed_worker_of_remote_calls_is_named_and_the_others_go_on(world, report, tmp_path):
    with pytest.raises(WorkerError) as ended:
        world(programs.remote_death, 3, env=report)
    assert ended.value.rank == 1
    (rank, task, kind, _, _), still, seconds = reports(tmp_path)[0]
    assert (rank, task, kind) == (1, "task 1 of 1 (die)", "lost")
    assert still == [3]
    assert seconds < 60.0  # not the time limit of the call


def kill_at_random(
    folder: Path, chance: random.Random, attempt: int, size: int, part: Path | None
) -> threading.Event:
    """Kill one of the processes of an attempt, some steps and some milliseconds into it.

    Args:
        folder: Where they say who they are, and how far.
        chance: For the process, the step and the moment.
        attempt: Number of the attempt.
        size: Number of processes.
        part: What exists while a checkpoint is written: the moment to kill; None: any.

    Returns:
        To be set when it is too late.
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


def killed(world, program, folder, kills, chance, sizes, part=None) -> int:
    """Kill runs that go on from each other; return how many steps are in the checkpoint."""
    broken = folder / "broken"
    for attempt in range(kills):
        environment = {"ATTEMPT": str(attempt), "PROGRESS": str(folder)}
        size = sizes[attempt % len(sizes)]
        over = kill_at_random(folder, chance, attempt, size, part and broken / part)
        try:
            with pytest.raises(WorkerError):
                world(program, size, str(broken), 10**6, env=environment)
        finally:
            over.set()
    done = todist.Checkpoint(broken / "state.pt").load()
    return 0 if done is None else done[0]


def assert_same_bits(results, want, start):
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
def test_a_run_that_is_killed_repeatedly_ends_like_one_that_is_not(
    world, standing, tmp_path, program, part
):
    chance = random.Random(program.__name__)
    # Each attempt goes on in another number of processes: the gradients are deterministic.
    steps = killed(world, program, tmp_path, KILLS, chance, (3, 2), part) + 2
    (want,) = standing(program, 1, str(tmp_path / "whole"), steps)
    start = [p.detach() for p in programs.make_net().parameters()]
    assert_same_bits(standing(program, 3, str(tmp_path / "broken"), steps), want, start)


def test_a_run_that_is_killed_while_it_saves_shards_ends_like_one_that_is_not(
    world, standing, tmp_path
):
    program = checkpoint_programs.checkpointed_shards
    chance = random.Random(3)
    steps = killed(world, program, tmp_path, KILLS, chance, (3,)) + 2
    want = standing(program, 3, str(tmp_path / "whole"), steps)[0]
    start = [p.detach() for p in programs.make_net().parameters()]
    assert_same_bits(standing(program, 3, str(tmp_path / "broken"), steps), want, start)


def test_worker_errors_travel_between_processes():
    error = WorkerError(3, "task 1 of 2", "raised", "Traceback: here")
    again = pickle.loads(pickle.dumps(error))
    assert (again.rank, again.task, again.kind) == (3, "task 1 of 2", "raised")
    assert str(again) == str(error)
    assert "rank 3 raised in task 1 of 2" in str(error)


def test_spawn_names_the_process_that_failed():
    with pytest.raises(LookupError, match="rank 0 raised"):
        todist.spawn(programs.fail, 2, ("nowhere",), start_method="forkserver", timeout=60)
    with pytest.raises(WorkerError, match="killed by signal 9"):
        todist.spawn(programs.die, 2, start_method="forkserver", timeout=60)
    with pytest.raises(WorkerError, match=r"ranks \[0\] still run"):
        todist.spawn(programs.wait_here, 1, (1000.0,), start_method="forkserver", timeout=0.5)
    with pytest.raises(ValueError, match="at least 1"):
        todist.spawn(programs.die, 0)
    with pytest.raises(TypeError, match=r"`args`: expected a tuple .*, got int; .* \(x,\)"):
        todist.spawn(print, 1, 3)
