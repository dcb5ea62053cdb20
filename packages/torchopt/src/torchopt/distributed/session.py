# SPDX-License-Identifier: Apache-2.0
"""The world that a process takes part in: opened once and shut down in order.

| backend | what runs where |
|---|---|
| `local` | one process: remote calls are ordinary calls, collectives are the identity |
| `rpc` | rank 0 calls functions on the others (torch.distributed.rpc) |
| `collective` | every rank runs the program (process groups of torch.distributed: gloo, nccl) |

If all processes run on one machine, they are bound to its loopback interface.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import multiprocessing
import multiprocessing.util
import os
import socket
import time
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from torchopt.distributed import meeting
from torchopt.distributed.board import Counter, Messages
from torchopt.distributed.folder import FOLDER, has_locks
from torchopt.distributed.inside import require_no_task
from torchopt.distributed.meeting import Meeting
from torchopt.distributed.slots import Slots
from torchopt.distributed.watch import Watch
from torchopt.torch_internals import abort_on, store_of

if TYPE_CHECKING:
    from torchopt.distributed.group import Group

__all__ = [
    "DEFAULT_TIMEOUT",
    "Session",
    "adopt",
    "close",
    "current",
    "open_collective",
    "open_local",
    "open_rpc",
]

DEFAULT_TIMEOUT = 300.0  # seconds
_LEAVING = 5.0  # seconds that rank 0 keeps its store for ranks that still end their groups


@dataclass
class Session:
    """An open world.

    Attributes:
        backend: `"local"`, `"rpc"` or `"collective"`.
        rank: The rank of this process.
        world_size: The number of processes.
        timeout: Seconds to wait for other processes.
        meeting: Connections and files of the world; None in a world of one process.
        suspects: Ranks that are gone or did not answer in time.
        owns_group: Whether torchopt made the process group.
        engines: How many engines this process has made in each group of this world.
        is_over: Whether this process has left the world or was forked from a process of it.
    """

    backend: str
    rank: int
    world_size: int
    timeout: float = DEFAULT_TIMEOUT
    meeting: Meeting | None = None
    suspects: set[int] = field(default_factory=set)
    owns_group: bool = False
    is_over: bool = False
    engines: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _barriers: dict[str, int] = field(default_factory=dict)
    _boards: dict[str, tuple[Messages, Counter | None, Slots]] = field(default_factory=dict)

    def boards(self, group: Group) -> tuple[Messages | None, Counter | None, Slots | None]:
        """Return the messages, the counter and the slots of a group; None across machines."""
        if self.meeting is None or self.meeting.folder is None:
            return None, None, None
        if group.name not in self._boards:
            short = hashlib.blake2b(group.name.encode(), digest_size=8).hexdigest()
            path = self.meeting.folder / f"messages.{short}"
            messages = Messages(path, group.rank, group.size)
            counter = Counter(self.meeting.folder / f"counter.{short}") if has_locks() else None
            slots = Slots(self.meeting.folder / f"slots.{short}", group.rank, group.size)
            self._boards[group.name] = messages, counter, slots
        return self._boards[group.name]

    @property
    def watch(self) -> Watch | None:
        """The watch that knows who failed; None in a world of one process."""
        return None if self.meeting is None else self.meeting.watch

    def check(self) -> None:
        """Raise the failure of another process, if there is one."""
        if self.watch is not None:
            self.watch.check()

    def barrier(self, names: tuple[str, ...], size: int) -> None:
        """Wait until `size` processes have called this with the same names; (): all processes."""
        if size <= 1 or self.watch is None:
            return
        key = "/".join(names)
        number = self._barriers[key] = self._barriers.get(key, -1) + 1
        ranks = () if names else self.watch.ranks
        self.watch.barrier(f"{key}#{number}", size, ranks, self.timeout)


_current: Session | None = None
_adopted: dict[tuple[int, ...], Session] = {}  # for process groups that the program made
_adoptions: defaultdict[tuple[int, ...], int] = defaultdict(int)  # how often by these ranks


def current() -> Session | None:
    """Return the open world, or None."""
    return _current


# --- opening --------------------------------------------------------------------------------------


def _meet(rank: int, world_size: int, timeout: float) -> Meeting:
    ranks = tuple(range(world_size))
    if not meeting.on_one_machine(world_size):
        return meeting.meet_across_machines(rank, ranks, timeout)
    if FOLDER not in os.environ and "MASTER_PORT" not in os.environ:
        meeting.require_address(world_size)
    lo = meeting.loopback_interface()
    for name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, lo)
    return meeting.meet_on_this_machine(rank, ranks, timeout)


def _close_at_exit() -> None:
    atexit.unregister(close)
    atexit.register(close)
    if multiprocessing.parent_process() is not None:
        # Forked children of multiprocessing end without calling `atexit` functions.
        multiprocessing.util.Finalize(None, close, exitpriority=100)


def _keep(session: Session) -> Session:
    global _current
    _close_at_exit()
    _current = session
    return session


def open_local(name: str) -> Session:
    """Open a world of one process, which can call itself by RPC if torch has RPC."""
    from torchopt.distributed import remote

    remote.open_alone(name)
    return _keep(Session("local", 0, 1))


def open_rpc(
    name: str, rank: int, world_size: int, backend: Any, options: Any, timeout: float
) -> Session:
    """Open a world of remote calls."""
    from torchopt.distributed import remote

    remote.require()
    met = _meet(rank, world_size, timeout)
    with met.opens("the opening of remote calls"):
        remote.open_world(met, name, rank, world_size, backend, options)
    return _keep(Session("rpc", rank, world_size, timeout, met))


def open_collective(backend: str, rank: int, world_size: int, timeout: float) -> Session:
    """Open a world of process groups.

    Args:
        backend: A backend of torch.distributed, such as `"gloo"`; `"collective"`: nccl for CUDA
            tensors if CUDA is available, gloo for CPU tensors.
        rank: The rank of this process.
        world_size: The number of processes.
        timeout: Seconds to wait for other processes.
    """
    if world_size == 1:
        return _keep(Session("collective", rank, world_size, timeout))
    met = _meet(rank, world_size, timeout)
    owned = not dist.is_initialized()
    if owned:
        with met.opens("the opening of the process group"):
            _open_group(met, backend, rank, world_size, timeout)
    return _keep(Session("collective", rank, world_size, timeout, met, owns_group=owned))


def _open_group(met: Meeting, backend: str, rank: int, world_size: int, timeout: float) -> None:
    if backend == "collective":
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        store=met.file_store("group", world_size) if met.store is None else met.store,
        rank=rank,
        world_size=world_size,
        # For operations of others, such as those of `fully_shard`, so that the judge decides first.
        timeout=timedelta(seconds=2 * timeout + 10),
    )


def adopt(group: Any, timeout: float = DEFAULT_TIMEOUT) -> Session:
    """Return a session for a process group that the program itself made.

    All ranks of the group call this together.
    """
    global _current
    ranks = tuple(dist.get_process_group_ranks(group))
    if ranks in _adopted:
        return _adopted[ranks]
    require_no_task(ranks)
    rank = dist.get_rank()
    store, key = store_of(group), _key_of(ranks)
    names = _call_the_roll(store, key, rank, ranks, timeout)
    _adoptions[ranks] += 1
    if len(set(names)) == 1:
        met = meeting.meet_in(store, key, rank, ranks, timeout)
    else:
        told: list[Any] = [None]

        def tell(value: Any) -> None:
            told[0] = str(value)
            dist.broadcast_object_list(told, src=ranks[0], group=group)

        def hear() -> Any:  # not by the store, which may tell everyone the token
            if told[0] is None:
                dist.broadcast_object_list(told, src=ranks[0], group=group)
            return told[0]

        given = os.environ.get("MASTER_ADDR") if ranks[0] == 0 else None
        host = given or socket.gethostbyname(names[0])
        met = meeting.meet_by(hear, tell, host, rank, ranks, timeout)
    session = Session("collective", rank, len(ranks), timeout, met)
    _adopted[ranks] = session
    _close_at_exit()
    if len(ranks) == dist.get_world_size():
        _current = session
    return session


def _key_of(ranks: tuple[int, ...]) -> str:
    """Return a key in a store for the next world of these ranks."""
    short = hashlib.blake2b(str(ranks).encode(), digest_size=8).hexdigest()
    return f"torchopt/{short}/{_adoptions[ranks]}"


def _call_the_roll(
    store: Any, key: str, rank: int, ranks: tuple[int, ...], timeout: float
) -> list[str]:
    """Wait for all ranks of a process group; return the names of their machines.

    Nobody watches over them yet, and an operation of the group would wait for its own timeout.

    Raises:
        TimeoutError: A rank does not come.
    """
    keys = [f"{key}/{r}" for r in ranks]
    store.set(f"{key}/{rank}", socket.gethostname())
    deadline, pause = time.monotonic() + timeout, 0.01
    while not store.check(keys):
        if time.monotonic() > deadline:
            missing = [r for r, k in zip(ranks, keys) if not store.check([k])]
            raise TimeoutError(
                f"rank {rank}: expected ranks {list(ranks)} of the process group to begin to work "
                f"with torchopt within {timeout:g} s, ranks {missing} are missing; make the same "
                "engines on every rank of the group, or raise `timeout`"
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.2)  # a thousand ranks may ask the same store
    return [name.decode() for name in store.multi_get(keys)]


# --- closing --------------------------------------------------------------------------------------


def close() -> set[int]:
    """Leave the world; called at exit. Waits for the others unless one of them is lost.

    Returns:
        The ranks that no longer answer and were not waited for.
    """
    global _current
    sessions = list(_adopted.values())
    if _current is not None and not any(each is _current for each in sessions):
        sessions.append(_current)
    _current = None
    _adopted.clear()
    behind: set[int] = set()
    for session in sessions:
        behind |= _leave(session)
    return behind


def _forget() -> None:
    """Leave all worlds without a goodbye, in a process that was forked from a rank."""
    global _current
    sessions = [*_adopted.values(), *([] if _current is None else [_current])]
    _current = None
    _adopted.clear()
    for session in sessions:
        session.is_over = True
        if session.meeting is not None:
            session.meeting.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _leave(session: Session) -> set[int]:
    session.is_over = True
    watch = session.watch
    if session.meeting is not None:
        session.meeting.hide()
    orderly = True
    behind = set(session.suspects)
    if watch is not None:
        failure = watch.failure
        if failure is not None and failure.rank is not None and failure.kind == "timed out":
            behind.add(failure.rank)  # after other failures it ends by itself
        if behind or failure is not None:
            watch.end_stopped()
        if watch.rank == watch.hub:
            for rank in behind:
                watch.abort(rank)
        orderly = watch.say_goodbye(frozenset(behind))
    if session.owns_group and dist.is_initialized():
        if not orderly:
            _abort_group()
        dist.destroy_process_group()
    elif session.backend != "collective":
        from torchopt.distributed import remote

        remote.leave(orderly and session.world_size > 1)
    if watch is not None:
        if orderly and session.meeting is not None and session.meeting.store is not None:
            watch.wait_for_ends(_LEAVING)
        watch.close()
    if session.meeting is not None:
        session.meeting.end()
    return behind - {session.rank}


def _abort_group() -> None:
    """Abandon a group whose operations will not end.

    gloo cannot cancel an operation that waits for a stopped process, and the destructor of the
    group waits for the operation. So the group is never destroyed.
    """
    group: Any = dist.group.WORLD
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    if torch.cuda.is_available():
        abort_on(group, "cuda")
