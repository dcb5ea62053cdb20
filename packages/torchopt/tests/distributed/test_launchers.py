# SPDX-License-Identifier: Apache-2.0
"""Who may join a world, what launchers say of it, and torch without remote calls."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import distributed_programs as programs
import pytest
import torch

from torchopt.distributed import slurm
from torchopt.distributed.link import StrangerError, connect
from torchopt.distributed.watch import Watch

PROGRAM = """
import os
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(child == 0))
@todist.auto_init_rpc(backend="collective", timeout=60)
def main():
    theta = torch.tensor([1.0, -1.0], requires_grad=True)
    step = todist.TaskParallel([theta]).backward(lambda t: ((theta - t) ** 2).sum(), [0.0, 1.0])
    return f"{todist.get_rank()} {todist.get_world_size()} {step.owners} {theta.grad}\\n"
told = main()
todist.shutdown()
try: remote()
except RuntimeError as error: sys.stdout.write(f"{told}{error}\\n")
sys.stdout.flush()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

WITHOUT_RPC = """
import sys, torch
gone = ("torch.distributed.rpc", "torch.distributed.autograd")
for name in [n for n in sys.modules if n.startswith(gone)]:
    del sys.modules[name]
for name in ("rpc", "autograd"):
    delattr(torch.distributed, name)
for name in ("torch.distributed.rpc", "torch.distributed.autograd"):
    sys.modules[name] = None
import torchopt.pytree, torchopt.typing
assert torchopt.typing.RRef is None
import torchopt.distributed as todist
assert not todist.is_available() and not todist.autograd.is_available()
@todist.auto_init_rpc(timeout=5)
def remote():
    pass
"""


def run(program: str, environment: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=programs.PATIENCE,
    )
    return done.returncode, done.stdout


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


@pytest.fixture
def hub():
    listener = socket.create_server(("127.0.0.1", 0))
    watch = Watch(0, (0, 1), 30.0, "the token", listener=listener)
    yield watch, ("127.0.0.1", listener.getsockname()[1])
    watch.close()


def test_only_who_knows_the_token_joins(hub):
    watch, address = hub
    many = b"x" * 9999
    for words in (b"GET / HTTP/1.0\r\n\r\n", b'{"rank": 1}\n', b'{"bye": true}\n', many):
        with socket.create_connection(address, timeout=30) as stranger:
            assert set(json.loads(stranger.recv(1000))) == {"challenge"}
            stranger.sendall(words)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1000) == b""  # shown the door
    with pytest.raises(StrangerError):
        connect(address, 1, 0, "another token", 30.0)
    assert watch.failure is None
    with pytest.raises(TimeoutError, match=r"ranks \[1\] are missing"):
        watch.wait_for_everyone(0.2)
    link = connect(address, 1, 0, "the token", 30.0)
    watch.wait_for_everyone(30.0)
    again = connect(address, 1, 0, "the token", 30.0)
    assert again.receive() is None  # a rank joins once
    again.connection.close()
    link.connection.close()
    assert watch.wait_for_failure(30.0).rank == 1


@pytest.mark.parametrize(("silence", "kind"), [(0.0, "lost"), (5.0, "timed out")])
def test_a_process_that_was_silent_before_its_end_was_stuck(hub, silence, kind):
    watch, address = hub
    link = connect(address, 1, 0, "the token", 30.0)
    watch.wait_for_everyone(30.0)
    watch._views[1].heard -= silence
    link.connection.close()
    failure = watch.wait_for_failure(30.0)
    assert (failure.rank, failure.kind) == (1, kind)


def test_a_hub_that_does_not_know_the_token_is_refused():
    listener = socket.create_server(("127.0.0.1", 0))
    watch = Watch(0, (0, 1), 30.0, "another token", listener=listener)
    with pytest.raises(StrangerError):
        connect(("127.0.0.1", listener.getsockname()[1]), 1, 0, "the token", 30.0)
    watch.close()


def test_srun_starts_a_world(tmp_path):
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node7",
        "SLURM_JOB_ID": free_port(),
    }
    context = multiprocessing.get_context("forkserver")
    processes = []
    for rank in (0, 1):
        own = {**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        args = (own, tmp_path / f"told.{rank}")
        processes.append(context.Process(target=programs.started_by_srun, args=args))
        processes[-1].start()
    for rank, process in enumerate(processes):
        process.join(programs.PATIENCE)
        told = ast.literal_eval((tmp_path / f"told.{rank}").read_text())
        assert told == (rank, 2, (0, 1), [1.0, -3.0])


def test_slurm_on_several_nodes():
    said = slurm.adopt(
        {
            "SLURM_STEP_NUM_TASKS": "5",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
            "SLURM_STEP_NODELIST": "gpu[08-09,12]",
            "SLURM_PROCID": "4",
            "SLURM_NODEID": "2",
            "SLURM_JOB_ID": "77",
            "MASTER_PORT": "1234",
        }
    )
    assert said["MASTER_ADDR"] == "gpu08"
    assert (said["RANK"], said["WORLD_SIZE"], said["LOCAL_WORLD_SIZE"]) == ("4", "5", "1")
    assert said["MASTER_PORT"] == "1234"
    assert slurm.adopt({"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "1", "RANK": "0"}) == {}


def test_process_groups_work_where_torch_has_no_remote_calls():
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    code, told = run(WITHOUT_RPC + PROGRAM, {**world, "MASTER_PORT": free_port()})
    assert code == 0, told
    for rank in (0, 1):
        assert f"{rank} 2 (0, 1) tensor([ 1., -3.])\n" in told
    assert told.count("torch.distributed.rpc), found one without") == 2


WITHOUT_DISTRIBUTED = """
import importlib.abc, sys, torch
dist = torch.distributed
for name in [n for n in sys.modules if n.startswith("torch.distributed.")]:
    del sys.modules[name]
for name in [n for n in vars(dist) if not n.startswith("__")]:
    delattr(dist, name)
dist.is_available = lambda: False
class Gone(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("torch.distributed.") or name == "torch._C._distributed_c10d":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
import torchopt, torchopt.pytree, torchopt.typing
net = torch.nn.Linear(2, 1)
torchopt.MetaAdam(net, lr=0.1).step(net(torch.ones(1, 2)).sum())
try: import torchopt.distributed
except ImportError as error: sys.stdout.write(str(error))
"""


def test_torch_without_distributed_gives_one_sentence():
    code, told = run(WITHOUT_DISTRIBUTED, {})
    assert code == 0, told
    assert "expected a torch built with torch.distributed, found one without" in told
    assert len(told) < 300


def page_of_ray() -> str:
    """Return the worker that the manual shows."""
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    return re.search(r"```\n(@ray.remote\n.*?)```", page.read_text(), re.DOTALL)[1]


def test_the_worker_of_the_manual_sets_what_torchrun_sets(monkeypatch):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")
    stand_in = SimpleNamespace(remote=lambda kind: kind)
    found = {"ray": stand_in, "os": os, "main": lambda: [os.environ[name] for name in names]}
    exec(page_of_ray(), found)
    told = found["Worker"]().run(1, 2, "127.0.0.1", "5000")
    assert told == ["1", "2", "1", "2", "127.0.0.1", "5000"]


@pytest.mark.parametrize("program", ["weights_and_unused", "users_own_world"])
def test_ray_workers(program):
    """In a world of ours, and in the process group that `ray.train` opens for its workers."""
    ray = pytest.importorskip("ray", reason="needs ray")
    ray.init(num_cpus=2, include_dashboard=False)
    folder = str(Path(programs.__file__).parent)

    def main():
        sys.path.insert(0, folder)
        return getattr(importlib.import_module("distributed_programs"), program)()

    found = {"ray": ray, "os": os, "main": main}
    exec(page_of_ray(), found)
    try:
        workers = [found["Worker"].remote() for _ in range(2)]
        port = free_port()
        first, second = ray.get(
            [w.run.remote(r, 2, "127.0.0.1", port) for r, w in enumerate(workers)], timeout=120
        )
    finally:
        ray.shutdown()
    if program == "users_own_world":
        assert first == second == (4.5, 1.5, (0, "task 1 of 2", "raised"))
    else:
        for a, b in zip(first, second):
            assert torch.equal(a, b)
