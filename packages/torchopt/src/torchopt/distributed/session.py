# SPDX-License-Identifier: Apache-2.0
"""The world a process takes part in: opened once, by torch's own rendezvous, and closed in order.

| backend | what runs where |
|---|---|
| `local` | one process: remote calls are calls, collectives are the identity |
| `rpc` | rank 0 calls functions on the others (torch.distributed.rpc) |
| `collective` | every rank runs the program (process groups of torch.distributed: gloo, nccl) |

All processes on one machine are bound to its loopback interface.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import ipaddress
import multiprocessing
import multiprocessing.util
import os
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.rpc as rpc
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from torchopt.distributed import wire
from torchopt.distributed.watch import Watch

__all__ = [
    "DEFAULT_TIMEOUT",
    "Session",
    "close",
    "current",
    "loopback_interface",
    "on_one_machine",
    "open_collective",
    "open_local",
    "open_rpc",
    "serve_store",
]

DEFAULT_TIMEOUT = 300.0  # seconds

_POLL = 0.2  # seconds between two looks at whether another process failed
_FAREWELL = 10.0  # seconds that the others have to come to their end when rank 0 is at its own


@dataclass
class Session:
    """An open world.

    Attributes:
        backend: `"local"`, `"rpc"` or `"collective"`.
        rank: Of this process.
        world_size: Number of processes.
        timeout: Seconds to wait for other processes.
        store: Shared dictionary of the world; None in a world of one.
        watch: Knows who failed; None in a world of one.
        suspects: Ranks that were lost or did not answer in time.
        owns_group: Whether the process group was made here.
    """

    backend: str
    rank: int
    world_size: int
    timeout: float = DEFAULT_TIMEOUT
    store: Any = None
    watch: Watch | None = None
    suspects: set[int] = field(default_factory=set)
    owns_group: bool = False
    _barriers: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise the failure of another process, if there is one."""
        if self.watch is not None:
            self.watch.check()

    def barrier(self, names: tuple[str, ...], size: int) -> None:
        """Wait until `size` processes have come here with the same names."""
        if size <= 1:
            return
        key = "/".join(("barrier", *names))
        round_ = self._barriers[key] = self._barriers.get(key, -1) + 1
        if self.store.add(f"{key}/{round_}", 1) == size:
            self.store.set(f"{key}/{round_}/open", "1")
        self.wait_for_key(f"{key}/{round_}/open")

    def wait_for_key(self, key: str) -> None:
        """Wait until the key is in the store.

        Raises:
            WorkerError: Another process failed meanwhile.
            TimeoutError: It did not come in `timeout` seconds.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                self.store.wait([key], timedelta(seconds=_POLL))
                return
            except dist.DistStoreError:
                self.check()
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"rank {self.rank}: expected the other processes at {key!r} within "
                        f"{self.timeout:g} s; one of them is late or does not come here"
                    ) from None
            except dist.DistNetworkError:
                # Rank 0 holds the store; it is gone. Its failure is on the way.
                if self.watch is not None and self.watch.wait_for_failure(5.0) is not None:
                    self.check()
                raise


_current: Session | None = None


def current() -> Session | None:
    """Return the open world, or None."""
    return _current


# --- addresses ------------------------------------------------------------------------------------


def loopback_interface() -> str:
    """Return the name of the loopback interface."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "lo")


def on_one_machine(world_size: int) -> bool:
    """Return whether all processes run on this machine: the launcher says so, or the address."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]) == world_size
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def serve_store(host: str, port: int = 0) -> tuple[Any, int]:
    """Return a store served by this process at one address only, and its port.

    torch's own server listens on every interface of the machine.

    Args:
        host: Address to listen on.
        port: 0: a free one.
    """
    listener = socket.create_server((host, port), backlog=512)
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        None,
        True,
        timedelta(seconds=DEFAULT_TIMEOUT),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


_served: list[Any] = []  # stores that live as long as the process


def _rendezvous(rank: int, world_size: int, timeout: float) -> Any:
    """Return the store that the launcher's environment describes."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise RuntimeError(
                f"expected {name} in the environment of a world of {world_size} processes, found "
                "none; start the script with torchrun, with torchopt.distributed.spawn, or set it"
            )
    if on_one_machine(world_size):
        lo = loopback_interface()
        for name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, lo)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            if rank == 0:
                address = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
                _served.append(serve_store(*address)[0])
            # To torch: the store is there already, everyone is a client.
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
            os.environ.setdefault("TORCHELASTIC_RESTART_COUNT", "0")
    url = f"env://?rank={rank}&world_size={world_size}"
    store, _, _ = next(rendezvous(url, timeout=timedelta(seconds=timeout)))
    return store


def _open_watch(store: Any, rank: int, world_size: int, timeout: float) -> Watch:
    if rank != 0:
        host, port = store.get("watch").decode().rsplit(":", 1)
        connection = socket.create_connection((host, int(port)), timeout=timeout)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Watch(rank, world_size, connection=connection)
    host = "127.0.0.1" if on_one_machine(world_size) else os.environ["MASTER_ADDR"]
    try:
        listener = socket.create_server((host, 0), backlog=world_size)
    except OSError:  # the address is that of a gateway: listen on every interface behind it
        listener = socket.create_server(("", 0), backlog=world_size)
    watch = Watch(rank, world_size, listener=listener)
    store.set("watch", f"{host}:{listener.getsockname()[1]}")
    watch.wait_for_everyone(timeout)
    return watch


# --- opening and closing --------------------------------------------------------------------------


def _keep(session: Session) -> Session:
    global _current
    atexit.unregister(close)
    atexit.register(close)
    if multiprocessing.parent_process() is not None:
        # Forked children of multiprocessing leave without what `atexit` has registered.
        multiprocessing.util.Finalize(None, close, exitpriority=100)
    _current = session
    return session


def open_local(name: str) -> Session:
    """Open the world of this process alone; RPC to itself works in it, where torch has RPC."""
    if dist.is_available() and hasattr(rpc, "TensorPipeRpcBackendOptions") and not _agent_is_set():
        os.environ.setdefault("TP_SOCKET_IFNAME", loopback_interface())
        # A file, and no address: launchers change what torch makes of those.
        with tempfile.TemporaryDirectory() as folder:
            url = f"file://{folder}/store"
            options = rpc.TensorPipeRpcBackendOptions(init_method=url)
            rpc.init_rpc(name, rank=0, world_size=1, rpc_backend_options=options)
    return _keep(Session("local", 0, 1))


def _agent_is_set() -> bool:
    is_set = getattr(getattr(rpc, "api", None), "_is_current_rpc_agent_set", None)
    return is_set is not None and bool(is_set())  # there is no RPC on Windows


def open_rpc(
    name: str, rank: int, world_size: int, backend: Any, options: Any, timeout: float
) -> Session:
    """Open a world of remote calls."""
    store = PrefixStore("torchopt", _rendezvous(rank, world_size, timeout))
    watch = _open_watch(store, rank, world_size, timeout)
    rpc.init_rpc(
        name, backend=backend, rank=rank, world_size=world_size, rpc_backend_options=options
    )
    return _keep(Session("rpc", rank, world_size, timeout, store, watch))


def open_collective(backend: str, rank: int, world_size: int, timeout: float) -> Session:
    """Open a world of process groups.

    Args:
        backend: One of torch.distributed, such as `"gloo"`; `"collective"`: nccl where there is
            CUDA, gloo elsewhere.
        rank: Of this process.
        world_size: Number of processes.
        timeout: Seconds to wait for other processes.
    """
    store = watch = None
    owned = False
    if world_size > 1:
        root = _rendezvous(rank, world_size, timeout)
        store = PrefixStore("torchopt", root)
        watch = _open_watch(store, rank, world_size, timeout)
        if not dist.is_initialized():
            if backend == "collective":
                backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(
                backend,
                store=PrefixStore("group", root),
                rank=rank,
                world_size=world_size,
                # A backstop: `Watch` knows of failures earlier.
                timeout=timedelta(seconds=2.0 * timeout + 60.0),
            )
            owned = True
    return _keep(Session("collective", rank, world_size, timeout, store, watch, owns_group=owned))


def close() -> None:
    """Leave the world; called at exit. Waits for the others unless one of them is lost."""
    global _current
    session, _current = _current, None
    if session is None:
        return
    watch = session.watch
    orderly = True
    if watch is not None:
        excused = set(session.suspects)
        if watch.failure is not None and watch.failure.rank is not None:
            excused.add(watch.failure.rank)
        for rank in session.suspects:
            watch.abort(rank)
        # Ranks that only serve do so for as long as rank 0 takes.
        patience = _FAREWELL if session.rank == 0 else threading.TIMEOUT_MAX
        if session.rank != 0 and session.backend == "collective" and watch.failed.is_set():
            patience = 0.0
        orderly = watch.say_goodbye(patience, frozenset(excused))
    if session.backend == "collective":
        if session.owns_group and dist.is_initialized():
            if not orderly:
                _abort_group()
            dist.destroy_process_group()
    elif _agent_is_set():
        rpc.shutdown(graceful=orderly and session.world_size > 1)
    if watch is not None:
        watch.close()
    wire.outbox.forget()
    wire.inbox.clear()


def _abort_group() -> None:
    """Let go of a group whose operations will not end.

    gloo cannot cancel an operation that waits for a process that is stopped, and the group's
    destructor waits for the operation: the group is never destroyed.
    """
    group: Any = dist.group.WORLD
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    if torch.cuda.is_available():
        with contextlib.suppress(RuntimeError, ValueError):  # there is no NCCL in the group
            group._get_backend(torch.device("cuda")).abort()
