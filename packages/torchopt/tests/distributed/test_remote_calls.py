# SPDX-License-Identifier: Apache-2.0
"""The data that remote calls send, and the errors that they return."""

from __future__ import annotations

import threading

import distributed_programs as programs
import torch
from ahead import ahead, in_world

from torchopt.distributed import memory, wire
from torchopt.distributed.deadlines import Deadlines

WEIGHT, BIAS = 100 * 50 * 8, 50 * 8


def test_parameters_are_sent_once_for_each_version_and_worker(standing):
    result = standing(programs.parameters_travel_once, 3, backend="rpc")[0]
    assert result["first version"] == 2 * (WEIGHT + BIAS)  # to ranks 1 and 2
    assert result["unchanged"] == 0
    assert result["weight changed"] == WEIGHT
    assert result["behind the counter"] == WEIGHT
    assert result["plain module"] == 0
    *first, second, third = result["values"]
    assert len(set(first)) == 1
    assert second != first[0]
    assert abs(third - result["expected third"]) < 1e-9
    assert result["after a worker wrote"] == third
    value, grad = result["tree"]
    assert value == 3.0 * 4950 + 1.0
    assert torch.equal(grad, torch.full((100,), 3.0))
    assert result["gradients"] == 3 * (WEIGHT + BIAS)  # one for each call comes back
    assert torch.equal(result["gradient"], torch.full((50,), 6.0, dtype=torch.float64))
    assert result["tied"] == [True, True]
    assert result["plain parameters"] == [("Parameter", True, True)] * 2
    assert result["shared parameters"] == [("Tensor", False, True), ("Tensor", True, True)]
    assert result["bits"]


@ahead(lambda folder: in_world(programs.what_calls_leave, 2))
def test_calls_free_all_their_memory(made):
    found = made[0]
    # New modules of 8 kB, and tensors that change: a worker keeps only the last ones.
    assert found["contents here"] <= 6
    assert found["contents there"] <= 6
    assert found["tensors"] <= 6
    assert found["deadlines"] <= 2 * 64
    assert found["late"] == ["timed out"] * 3
    assert found["running"] == 0


@ahead(lambda folder: in_world(programs.memory_of_large_calls, 2))
def test_large_calls_leave_no_memory(made):
    (caller, worker), late = made[0]
    assert late == ["timed out"] * 8
    assert caller < 100.0  # MiB; 30 calls send 300
    assert worker < 100.0


def test_memory_is_returned_whenever_much_was_freed(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "_give_back", lambda: given.append(len(inbox._contents)))
    monkeypatch.setattr(memory, "_freed", 0)
    inbox = wire.Inbox()
    for k in range(20):
        old = [bytes([k - 1])] if k else []
        inbox.put(1, {bytes([k]): torch.zeros(2**20)}, old)
    assert given == [1, 1]  # 76 MiB have been freed


def test_functions_are_called_at_their_time_unless_cancelled(capsys):
    called = []

    def fail():
        raise RuntimeError("can't start new thread")

    done = threading.Event()
    deadlines = Deadlines()
    numbers = [deadlines.add(1000.0, lambda: called.append("late")) for _ in range(1000)]
    off = deadlines.add(0.05, lambda: called.append("off"))
    deadlines.call_off(off)
    deadlines.add(0.01, fail)
    deadlines.add(0.1, lambda: called.append("second"))
    deadlines.add(0.0, lambda: called.append("never"))
    deadlines.add(0.15, done.set)
    for number in numbers:
        deadlines.call_off(number)
    assert done.wait(30.0)
    assert called == ["second"]
    assert len(deadlines) < 100
    assert "can't start new thread" in capsys.readouterr().err  # and the others were called


def test_errors_name_rank_task_and_traceback(standing):
    result = standing(programs.remote_errors, 3, backend="rpc")[0]
    rank, task, kind, trace, kinds = result["raised"]
    assert (rank, task, kind) == (1, "task 1 of 1 (fail)", "raised")
    assert "LookupError: no such thing" in trace
    assert "in fail" in trace
    assert {"LookupError", "WorkerError", "TorchOptError"} <= set(kinds)
    assert "OwnError" in result["own class"][4]
    assert result["exit"][2] == "raised"
    assert "SystemExit: 4" in result["exit"][3]
    rank, task, kind, trace, _ = result["unreadable"]
    assert (rank, task, kind) == (1, "task 1 of 1 (only_there)", "raised")
    assert "expected a result that rank 0 can read, got ImportError: a module of rank 1;" in trace
    rank, task, kind, trace, _ = result["late"]
    assert (rank, task, kind) == (1, "task 1 of 1 (wait_here)", "timed out")
    assert "in wait_here" in trace  # where the worker stood
    rank, task, kind, trace, kinds = result["second task"]
    assert (rank, task, kind) == (2, "task 2 of 2 (int)", "raised")
    assert "ValueError" in kinds
    name, text = result["lambda"]
    assert name == "PicklingError"
    assert "top level of a module" in text
    assert result["async"] == [0.0, 1.0, 2.0, 3.0]
    assert result["by name"] == [2]


def test_trees_of_references_are_read_locally_and_remotely(standing):
    found = standing(programs.references_to_leaves, 2, backend="rpc")[0]
    assert found["backend"] == "rpc"
    assert found["autograd"]
    assert len(set(found["owners"])) == 1
    for place in ("here", "local", "there"):
        assert found[place]["w"].tolist() == [0.0, 1.0, 2.0]
        assert found[place]["b"][0].item() == 2.0
