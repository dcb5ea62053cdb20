# SPDX-License-Identifier: Apache-2.0
"""Who may join a world, the variables of launchers, and torch without remote calls."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import distributed_programs as programs
import pytest
import torch
from ahead import ahead, codes_of, ends_of, free_port, in_world, reports, started

from torchopt.distributed import connections, meeting, slurm
from torchopt.distributed import link as link_module
from torchopt.distributed.board import Board
from torchopt.distributed.hub_store import HubStore
from torchopt.distributed.link import Link, StrangerError, connect
from torchopt.distributed.watch import Watch
from torchopt.errors import WorkerError

PROGRAM = """
import os
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(child == 0))
@todist.auto_init_rpc(backend="collective", timeout=60)
def main():
    theta = torch.tensor([1.0, -1.0], requires_grad=True)
    step = todist.TaskParallel([theta]).backward(lambda t: ((theta - t) ** 2).sum(), [0.0, 1.0])
    return f"{todist.get_rank()} {todist.get_world_size()} {step.owners} {theta.grad}\\n"
try: remote()
except RuntimeError as error: told = f"{error}\\n"
sys.stdout.write(told + main())
sys.stdout.flush()  # both end without a shutdown
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


@pytest.fixture
def hub():
    listener = socket.create_server(("127.0.0.1", 0))
    watch = Watch(0, RANKS, 30.0, "the token", listener=listener)
    yield watch, ("127.0.0.1", listener.getsockname()[1])
    watch.close()


RANKS = (0, 1)


def test_only_processes_with_the_token_can_join(hub):
    watch, address = hub
    proofs = ['{"rank": 1, "proof": "\u00e9", "challenge": "x"}\n'.encode()]
    proofs += [b'{"rank": 1, "proof": "x", "challenge": "\\ud800"}\n', b"[" * 4000 + b"\n"]
    words_of = [b"GET / HTTP/1.0\r\n\r\n", b'{"rank": 1}\n', b'{"bye": true}\n', b"x" * 9999]
    for words in (*words_of, *proofs):
        with socket.create_connection(address, timeout=30) as stranger:
            assert set(json.loads(stranger.recv(1000))) == {"challenge"}
            stranger.sendall(words)
            with contextlib.suppress(ConnectionError):
                assert stranger.recv(1000) == b""  # the connection is closed
    with pytest.raises(StrangerError):
        connect(address, 1, RANKS, "another token", 30.0)
    assert watch.failure is None
    with pytest.raises(TimeoutError, match=r"ranks \[1\] are missing"):
        watch.wait_for_everyone(0.2)
    link = connect(address, 1, RANKS, "the token", 30.0)
    watch.wait_for_everyone(30.0)
    with pytest.raises(RuntimeError, match=f"found one in which process {os.getpid()} .* is this"):
        connect(address, 1, RANKS, "the token", 30.0)  # a rank can join only once
    with pytest.raises(RuntimeError, match="rank 2 of 3: .* found one of 2 processes; end what"):
        connect(address, 2, (0, 1, 2), "the token", 30.0)
    with pytest.raises(RuntimeError, match=r"rank 3 of 2: .* found one of ranks \[0, 1\]"):
        connect(address, 3, (0, 3), "the token", 30.0)  # a part of the world, with its token
    assert watch.failure is None
    link.connection.close()
    assert watch.wait_for_failure(30.0).rank == 1


@pytest.fixture
def member(hub):
    """The store of rank 1, and the watch of rank 1."""
    watch = Watch(1, RANKS, 30.0, "the token", hub=connect(hub[1], 1, RANKS, "the token", 30.0))
    hub[0].wait_for_everyone(30.0)
    yield HubStore(watch.ask, 30.0), watch
    watch.close()


def test_the_store_says_what_rank_0_cannot_do(member):
    store, _ = member
    store.set("text", "é日")
    with pytest.raises(RuntimeError, match="asked for 'add' and cannot answer: ValueError: inv"):
        store.add("text", 1)
    assert store.get("text") == "é日".encode()
    with pytest.raises(ValueError, match="zip"):
        store.multi_set(["a", "b"], ["1"])
    assert store.add("count", 2) == 2
    assert store.check(["text", "count"])
    assert not store.check(["text", "none"])
    assert store.getNumKeys() == 2


def test_the_store_takes_values_of_some_megabytes(hub, member):
    value = bytes(range(256)) * 2**14
    member[0].set("large", value)
    assert member[0].get("large") == value
    assert hub[0].failure is None


def test_nothing_is_kept_of_a_wait_that_timed_out(hub, member):
    store, watch = member
    for _ in range(3):
        with pytest.raises(torch.distributed.DistStoreError, match="within 0.05 s"):
            store.wait(["never"], timedelta(seconds=0.05))
    assert not store.check(["never"])  # rank 0 has read all that came before
    assert hub[0]._rendezvous._waiting == []
    assert watch._rendezvous._answers == {}


def test_questions_end_when_rank_0_has_left(hub, member):
    store, watch = member
    with ThreadPoolExecutor(2) as ends:
        both = [ends.submit(each.say_goodbye, frozenset()) for each in (hub[0], watch)]
        assert all(end.result(30.0) for end in both)
    hub[0].close()
    for ask in (lambda: store.add("count", 1), lambda: store.get("never")):
        with pytest.raises(torch.distributed.DistNetworkError, match="from rank 0, which has left"):
            ask()


def test_a_store_lives_as_long_as_torch_uses_it(member):
    store = HubStore(member[1].ask, 30.0)
    part = torch.distributed.PrefixStore("part", store)
    gone = weakref.ref(store)
    HubStore._all[-1].leave()
    del store
    gc.collect()
    assert gone() is not None
    with pytest.raises(torch.distributed.DistNetworkError, match="world, found one that this proc"):
        part.set("key", "value")


def test_the_thread_that_reads_answers_waits_for_none(hub, member):
    """Finalizers run in any thread, and torch's may ask the store."""
    (watch, _), (store, _) = hub, member
    for each, ask in ((watch, lambda: watch.ask("get", ["x"])), (member[1], store.getNumKeys)):
        told = queue.SimpleQueue()

        def beat(ask=ask, told=told):
            try:
                told.put(ask())
            except RuntimeError as error:
                told.put(str(error))

        each.beat = beat
        assert "found one in the thread that reads the answers" in told.get(timeout=30.0)


def test_a_name_that_leads_other_machines_elsewhere_is_refused(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    with pytest.raises(RuntimeError, match="'node7', which is 127.0.1.1 here and another"):
        meeting.meet_across_machines(0, (0, 1), 1.0)


def test_a_world_that_ends_leaves_its_address_to_the_next(hub):
    watch, address = hub
    watch.report(RuntimeError("a failure"), None)
    until = time.monotonic() + 30.0
    while True:
        try:
            connect(address, 1, RANKS, "the token", 30.0)
        except StrangerError:
            assert time.monotonic() < until
        except ConnectionRefusedError:
            break


def test_rank_0_waits_for_its_port_and_says_which_is_taken(monkeypatch):
    monkeypatch.setattr(meeting, "_REOPENING", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"expected port {port} of 127.0.0.1 to be free"):
            meeting._listener("127.0.0.1", port, 1)
    monkeypatch.setattr(meeting, "_REOPENING", 30.0)
    meeting._listener("127.0.0.1", port, 1).close()


@pytest.mark.parametrize("what", ["rank 0", "store"])
def test_what_is_missing_at_the_store_of_a_launcher_is_named(monkeypatch, what):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port if what == "rank 0" else free_port()
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    told = {
        "rank 0": "rank 1: expected rank 0 on this machine within 0.5 s, found none",
        "store": f"rank 1: expected the launcher's store at port {port} within 0.5 s, found none",
    }
    with pytest.raises(TimeoutError, match=told[what]):
        meeting.meet_on_this_machine(1, (0, 1), 0.5)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_rank_0_may_have_an_address_of_ipv6():
    with meeting._listener("::1", 0, 1) as listener:
        assert listener.family == socket.AF_INET6


def test_strangers_do_not_block_ranks(hub):
    watch, address = hub
    many = connections._STRANGERS + len(RANKS)
    strangers = [socket.create_connection(address, timeout=30) for _ in range(many + 3)]
    link = connect(address, 1, RANKS, "the token", 30.0)
    watch.wait_for_everyone(30.0)
    for k, stranger in enumerate(strangers[:5]):
        assert stranger.recv(1000)
        if k < 4:  # there was room for the last connections and for the rank
            assert stranger.recv(1000) == b""
    for stranger in strangers:
        stranger.close()
    assert watch.failure is None
    link.connection.close()


def test_a_connection_is_closed_if_the_other_side_does_not_read(monkeypatch):
    """The next message would be read as the rest of one that was sent in part."""
    monkeypatch.setattr(link_module, "_SENDING", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname(), timeout=30.0)
        link = Link(listener.accept()[0])
    link.send({"words": "x" * 3 * 10**7})
    link.send({"bye": True})
    received = bytearray()
    while block := theirs.recv(2**20):
        received += block
    assert b"\n" not in received
    theirs.close()
    link.connection.close()


def test_a_rank_that_ends_before_the_others_come_is_named_at_once():
    listener = socket.create_server(("127.0.0.1", 0))
    watch = Watch(0, (0, 1, 2), 30.0, "the token", listener=listener)
    address = ("127.0.0.1", listener.getsockname()[1])
    connect(address, 1, (0, 1, 2), "the token", 30.0).connection.close()
    with pytest.raises(WorkerError) as ended:
        watch.wait_for_everyone(programs.PATIENCE)
    assert (ended.value.rank, ended.value.kind) == (1, "lost")
    watch.close()


def late_at_a_port(folder: Path) -> tuple[list, list]:
    """Return the results of two ranks of a world, and the errors of processes that come later."""
    port, go = free_port(), folder / "go"

    def ranks(where: str, whom: list[tuple[int, int]]) -> list[tuple]:
        (folder / where).mkdir()
        return [(*who, port, folder / where / str(k), go) for k, who in enumerate(whom)]

    def told(where: str, count: int) -> list:
        return [ast.literal_eval((folder / where / str(k)).read_text()) for k in range(count)]

    with started(programs.started_at_a_port, ranks("first", [(0, 2), (1, 2)])) as world:
        until = time.monotonic() + programs.PATIENCE
        while not all((folder / "first" / f"{k}.open").exists() for k in (0, 1)):
            assert time.monotonic() < until
            time.sleep(0.02)
        ends_of(programs.started_at_a_port, ranks("late", [(1, 2), (0, 2), (1, 3)]))
        late = told("late", 3)
        go.touch()
        codes_of(world)
        return told("first", 2), late


@ahead(late_at_a_port)
def test_a_late_process_is_told_which_world_is_open(made):
    world, (second, another, larger) = made
    assert world == [((0, 1), [1.0, -3.0])] * 2
    assert re.search(r"rank 1 of 2: .* found one in which process \d+ on .* is this rank", second)
    assert "expected one world of this user at a time at MASTER_PORT" in another
    assert "rank 1 of 3: expected a world that waits for this process" in larger
    assert "found one of 2 processes" in larger


def across(program, how: str, more: dict[str, str] | None = None) -> tuple[list, int]:
    """Return the results of a world on "several machines", and the port at which it meets."""
    environment = {
        **(more or {}),
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.2",
        "GLOO_SOCKET_IFNAME": meeting.loopback_interface(),
        "TP_SOCKET_IFNAME": meeting.loopback_interface(),
        "TORCHOPT_TOKEN": "" if how == "without a token" else "a secret",
    }
    if how == "a launcher's store":
        store = torch.distributed.TCPStore("127.0.0.2", 0, is_master=True, wait_for_workers=False)
        environment["TORCHELASTIC_USE_AGENT_STORE"], port = "True", store.port
    else:
        port = free_port()
    return in_world(program, 2, env={**environment, "MASTER_PORT": str(port)}), port


@pytest.mark.parametrize("how", ["without a token", "a token", "a launcher's store"])
@ahead(lambda folder, how: across(programs.worlds_across_machines, how))
def test_worlds_across_machines_can_follow_each_other(made, how):
    found, port = made
    for rank, worlds in enumerate(found):
        for number, world in enumerate(worlds, 1):
            assert world["grad"] == [1.0, -2.0 * number - 1.0]
            assert world["failed"] == (0, "task 1 of 2", "raised")
            assert not world["shares files"]
            assert ("is this rank; end what is left" in world.get("a second rank 1", "")) == rank
            # Nothing of the group is in a store that answers everyone; the token, if it must be.
            assert world.get("others' keys", []) == []
            assert world.get("token told", False) == (how == "without a token")
            assert world["warned"] == (how == "without a token" and rank == 0)
            if how == "a token":
                hub = [x for x in world["listens at"] if x.endswith(f":{port:04X}")]
                assert hub == ["0200007F:" + f"{port:04X}"] * (rank == 0)


def late_at_the_opening(folder: Path) -> dict:
    environment = {"FAULT_REPORT": str(folder / "report")}
    with contextlib.suppress(WorkerError):
        across(programs.hanging_at_the_opening, "a token", environment)
    return reports(folder)


@ahead(late_at_the_opening)
def test_an_opening_that_hangs_ends_at_the_timeout_of_the_world(made):
    for (_, task, kind, _, _), seconds in made.values():
        assert (task, kind) == ("the opening of the process group", "timed out")
        assert seconds < 3.0 + 2.0 + 5.0  # not torch's own limit of 16; the machine may be busy
    assert 0 in made


@ahead(lambda folder: across(programs.calls_across_machines, "a token"))
def test_remote_calls_across_machines_use_the_store_of_the_ranks(made):
    (first, others), port = made
    assert first[0] == [()] * 2
    assert f"0200007F:{port:04X}" in first[1]
    assert all(x.startswith(("0100007F", "0200007F")) for x in (*first[1], *others[1]))


def of_a_stranger(folder: Path, token: str) -> list:
    """Return what ranks learn whose last one has another token than the first two, or none."""
    port = free_port()
    shared = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.2"}
    ranks = [
        (r, {**shared, "MASTER_PORT": str(port), "TORCHOPT_TOKEN": has}, folder / str(r))
        for r, has in enumerate(("a secret", "a secret", token))
    ]
    ends_of(programs.started_with_a_token, ranks)
    return [ast.literal_eval((folder / str(rank)).read_text()) for rank in range(3)]


@pytest.mark.parametrize("token", ["another", ""])
@ahead(of_a_stranger)
def test_who_has_another_token_is_told_and_the_others_name_what_is_missing(made, token):
    first, second, stranger = made
    assert ("rank 2: expected rank 0 at 127.0.0.2" in stranger) == bool(token)
    assert "set TORCHOPT_TOKEN to the same secret on every machine" in stranger
    assert "ranks [2] are missing" in first
    assert "rank 0" in second


@pytest.mark.parametrize(
    "forge",
    [
        lambda line: line.replace(b"a note", b"a lie!"),
        lambda line: line + line,
        lambda line: b'{"bye": true}\n' + line,
        lambda line: line[::-1],
    ],
    ids=["changed", "repeated", "added", "reversed"],
)
def test_lines_that_somebody_changes_repeats_or_adds_end_the_connection(hub, forge):
    watch, address = hub
    link = connect(address, 1, RANKS, "the token", 30.0)
    watch.wait_for_everyone(30.0)
    sent = []

    def send(line):
        sent.append(bytes(line))
        return len(line)

    link.connection, real = SimpleNamespace(send=send), link.connection
    link.send({"doing": ["other", "a note", 0.0, [], 0.0]})
    real.sendall(sent[0])
    until = time.monotonic() + 30.0
    while watch._views[1].doing.name != "a note":
        assert time.monotonic() < until
        time.sleep(0.01)
    link.send({"doing": ["other", "a note", 0.0, [], 0.0]})
    real.sendall(forge(sent[1]))
    failure = watch.wait_for_failure(30.0)
    assert (failure.rank, failure.kind, watch._views[1].doing.name) == (1, "lost", "a note")
    real.close()


@pytest.mark.parametrize(
    ("silence", "was_ended", "kind"),
    [
        (0.0, False, "lost"),
        (2.0, False, "lost"),
        (0.0, True, "timed out"),
        (5.0, False, "timed out"),
    ],
)
def test_only_a_process_that_was_stuck_before_its_end_timed_out(
    hub, tmp_path, silence, was_ended, kind
):
    """A process that is slow on a busy machine and then ends is lost."""
    watch, address = hub
    watch._board = Board(tmp_path, 0)
    link = connect(address, 1, RANKS, "the token", 30.0)
    watch.wait_for_everyone(30.0)
    if was_ended:
        watch._board._mark(1).touch()
    watch._views[1].heard -= silence
    link.connection.close()
    failure = watch.wait_for_failure(30.0)
    assert (failure.rank, failure.kind) == (1, kind)


def test_a_hub_without_the_token_is_refused():
    listener = socket.create_server(("127.0.0.1", 0))
    watch = Watch(0, RANKS, 30.0, "another token", listener=listener)
    with pytest.raises(StrangerError):
        connect(("127.0.0.1", listener.getsockname()[1]), 1, RANKS, "the token", 30.0)
    watch.close()


def by_srun(folder: Path) -> list[str]:
    """Return the reports of two processes of `srun`."""
    shared = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node7",
        "SLURM_JOB_ID": str(free_port()),
    }
    told = [folder / f"told.{rank}" for rank in (0, 1)]
    own = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    ends_of(programs.started_by_srun, [({**shared, **x}, path) for x, path in zip(own, told)])
    return [ast.literal_eval(path.read_text()) for path in told]


@ahead(by_srun)
def test_srun_starts_a_world(made):
    assert made == [(rank, 2, (0, 1), [1.0, -3.0]) for rank in (0, 1)]


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


def without_rpc(folder: Path) -> tuple[int, str]:
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    return run(WITHOUT_RPC + PROGRAM, {**world, "MASTER_PORT": str(free_port())})


@ahead(without_rpc)
def test_process_groups_work_where_torch_has_no_remote_calls(made):
    code, told = made
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


@ahead(lambda folder: run(WITHOUT_DISTRIBUTED, {}))
def test_torch_without_distributed_raises_a_one_sentence_error(made):
    code, told = made
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
    """In our own world, and in the process group that `ray.train` opens for its workers."""
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
        port = str(free_port())
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
