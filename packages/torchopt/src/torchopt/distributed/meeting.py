# SPDX-License-Identifier: Apache-2.0
"""How the processes of a world find each other, and the secret that they share.

On one machine they use a folder that only the user can read. A file in it holds the address of the
hub and the token of the world; torch's stores (`FileStore`) lie beside it, so no store listens on a
port. The store of a launcher such as torchrun only says where the folder is.

Across machines the token is `TORCHOPT_TOKEN`, and the hub listens at `MASTER_ADDR` and
`MASTER_PORT`. If a launcher's store is there, the hub's address goes through it. Without
`TORCHOPT_TOKEN` the token goes through torch's `TCPStore`, and is as secret as that: not at all.
Everything else that the processes tell each other through a store is in a `HubStore`.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import os
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from torchopt.distributed.board import Board
from torchopt.distributed.folder import FOLDER, HUB, Folder, is_met_at, place_of, point
from torchopt.distributed.hub_store import HubStore
from torchopt.distributed.link import StrangerError, connect
from torchopt.distributed.watch import Watch

__all__ = [
    "Meeting",
    "loopback_interface",
    "meet_across_machines",
    "meet_by",
    "meet_in",
    "meet_on_this_machine",
    "on_one_machine",
    "require_address",
]

TOKEN = "TORCHOPT_TOKEN"  # a secret that is given to all processes of a world
_ADDRESS = "torchopt/hub"  # the key in the launcher's store
_REOPENING = 5.0  # seconds for the address of a previous world to become free


def loopback_interface() -> str:
    """Return the name of the loopback interface."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "lo")


def on_one_machine(world_size: int) -> bool:
    """Return whether all processes run on this machine, by the launcher's variables or address."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]) == world_size
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _nothing(*args: Any) -> None:
    """Do nothing."""


class Meeting:
    """A world whose processes have found each other.

    Attributes:
        watch: The connections and the watch over them.
        held: The folder of the processes of one machine; None across machines.
        store: The store of the ranks across machines; else None.
        launchers: The store through which they met, if there is one.
        withdraw: Takes back what has been published.
    """

    def __init__(self, watch: Watch, held: Folder | None) -> None:
        self.watch = watch
        self.held = held
        self.store: HubStore | None = None
        self.launchers: Any = None
        self.withdraw: Callable[[], Any] = _nothing

    @property
    def folder(self) -> Path | None:
        """The path of the folder; None across machines."""
        return None if self.held is None else self.held.path

    def file_store(self, name: str, size: int) -> Any:
        """Return a store of torch in the folder."""
        assert self.folder is not None
        stores: Any = dist  # the name is documented, and not in `__all__`
        return stores.FileStore(str(self.folder / name), size)

    def hide(self) -> None:
        """Withdraw the address, so that no other process can find this world."""
        withdraw, self.withdraw = self.withdraw, _nothing  # once: another world may use it next
        with contextlib.suppress(OSError, RuntimeError):  # the store may have been closed
            withdraw()

    def end(self) -> None:
        """Leave the folder; the last process removes it."""
        self.hide()
        if self.held is not None:
            self.held.leave()
        if self.store is not None:
            self.store.leave()

    @contextlib.contextmanager
    def ends_on_error(self) -> Iterator[None]:
        """Clean up a world that could not be opened."""
        try:
            yield
        except BaseException:
            self.watch.close()
            self.end()
            raise

    @contextlib.contextmanager
    def opens(self, name: str) -> Iterator[None]:
        """Wait for the others, who open the world in the same way; clean up if that fails."""
        watch = self.watch
        with self.ends_on_error(), watch.operation(name, watch.timeout, watch.ranks):
            yield

    def forget(self) -> None:
        """Release everything in a forked child, which is not a rank."""
        self.watch.forget()
        if self.held is not None:
            self.held.forget()


def meet_on_this_machine(rank: int, ranks: tuple[int, ...], timeout: float) -> Meeting:
    """Return the world if all its processes run on this machine."""
    if FOLDER in os.environ:
        place = Path(os.environ[FOLDER]) / HUB
        return meet_at(lambda: place, lambda path: point(place, path), rank, ranks, timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        try:
            store = launcher_store(rank, len(ranks), timeout)
        except dist.DistError as error:
            raise TimeoutError(
                f"rank {rank}: expected the launcher's store at port {os.environ['MASTER_PORT']} "
                f"within {timeout:g} s, found none; torchrun has ended, or `timeout` is too short"
            ) from error
        return meet_in(store, _ADDRESS, rank, ranks, timeout)
    port = os.environ["MASTER_PORT"]
    place = place_of(port)
    if rank == ranks[0] and is_met_at(place):
        raise RuntimeError(
            f"expected one world of this user at a time at MASTER_PORT {port}, found another one "
            "that is open there; give each world a port of its own"
        )
    withdraw = partial(place.unlink, missing_ok=True) if rank == ranks[0] else _nothing
    try:
        met = meet_at(lambda: place, lambda path: point(place, path), rank, ranks, timeout)
    except BaseException:
        withdraw()
        raise
    met.withdraw = withdraw  # only at the end, so that a late process learns what is open there
    return met


def meet_in(store: Any, key: str, rank: int, ranks: tuple[int, ...], timeout: float) -> Meeting:
    """Return the world of one machine; the path of the hub's file is in a store of torch."""

    def find() -> Path:
        if not store.check([key]):  # `get` would wait and then name nobody
            raise FileNotFoundError(key)
        return Path(store.get(key).decode())

    return meet_at(find, lambda path: store.set(key, str(path)), rank, ranks, timeout)


def meet_at(
    find: Callable[[], Path],
    publish: Callable[[Path], None],
    rank: int,
    ranks: tuple[int, ...],
    timeout: float,
) -> Meeting:
    """Return the world; the hub publishes its address in a file.

    Args:
        find: Returns the path of the hub's file.
        publish: Publishes that path.
        rank: The rank of this process.
        ranks: All ranks; the first is the hub.
        timeout: Seconds to wait for the others.
    """
    if rank == ranks[0]:
        held = Folder()
        token = os.environ.get(TOKEN) or secrets.token_hex(32)
        listener = socket.create_server(("127.0.0.1", 0), backlog=len(ranks))
        record = {"port": listener.getsockname()[1], "token": token, "folder": str(held.path)}
        path = held.claim(HUB)
        path.write_text(json.dumps(record))
        board = Board(held.path, rank)
        watch = Watch(rank, ranks, timeout, token, listener=listener, board=board)
        met = Meeting(watch, held)
        with met.ends_on_error():
            publish(path)
            watch.wait_for_everyone(timeout)
        return met
    deadline = time.monotonic() + timeout
    while True:
        try:
            # The file may be left from an earlier run, its port closed or used by another program.
            path = find()
            if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():
                raise StrangerError
            record = json.loads(path.read_text())
            address = ("127.0.0.1", int(record["port"]))
            token = os.environ.get(TOKEN) or str(record["token"])
            link = connect(address, rank, ranks, token, timeout)
        except (OSError, ValueError, KeyError, StrangerError, dist.DistError) as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank}: expected rank {ranks[0]} on this machine within {timeout:g} s, "
                    f"found none of this world ({type(error).__name__}); start all "
                    "processes as the same user, with the same TORCHOPT_TOKEN or none"
                ) from error
            time.sleep(0.02)
        else:
            held = Folder(Path(record["folder"]))
            board = Board(held.path, rank)
            return Meeting(Watch(rank, ranks, timeout, token, hub=link, board=board), held)


def meet_across_machines(rank: int, ranks: tuple[int, ...], timeout: float) -> Meeting:
    """Return the world if its processes run on several machines."""
    require_address(len(ranks))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == ranks[0]:
        _require_reachable(host)
    is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ.get(TOKEN) and not is_launchers:  # then no store of torch is needed
        told = json.dumps([host, port, ""])
        met = meet_by(lambda: told, _nothing, host, rank, ranks, timeout, port=port)
    else:
        if rank == ranks[0] and not os.environ.get(TOKEN):
            warnings.warn(
                f"the token of this world is in the store at {host}:{port}, which gives it to "
                "everyone who can connect; set TORCHOPT_TOKEN to the same secret on every machine",
                stacklevel=2,
            )
        met = _meet_by_store(host, rank, ranks, timeout)
    met.store = HubStore(met.watch.ask, 2 * timeout + 10)  # later than the judge
    return met


def _require_reachable(host: str) -> None:
    """Raise a `RuntimeError` at rank 0 if its name leads other machines elsewhere."""
    with contextlib.suppress(ValueError):  # the user gave an address, and knows where it leads
        ipaddress.ip_address(host)
        return
    with contextlib.suppress(OSError):  # reported when it is used
        found = socket.gethostbyname(host)
        if host != "localhost" and ipaddress.ip_address(found).is_loopback:
            raise RuntimeError(
                f"rank 0: expected MASTER_ADDR to lead other machines to this one, found {host!r}, "
                f"which is {found} here and another address elsewhere (see /etc/hosts); set it to "
                "an address of this machine on every machine, or LOCAL_WORLD_SIZE to the number of "
                "all processes if they run here"
            )


def _meet_by_store(host: str, rank: int, ranks: tuple[int, ...], timeout: float) -> Meeting:
    # A port that remains in use is reported soon, by rank 0.
    deadline = time.monotonic() + (min(timeout, _REOPENING) if rank == ranks[0] else timeout)
    while True:
        try:
            store = launcher_store(rank, len(ranks), timeout)
            find, publish = partial(store.get, _ADDRESS), partial(store.set, _ADDRESS)
            met = meet_by(find, publish, host, rank, ranks, timeout)
        except dist.DistError as error:  # the store of a previous world, which ended or is ending
            if time.monotonic() > deadline:
                if rank == ranks[0]:
                    raise
                raise RuntimeError(
                    f"rank {rank}: expected a store of torch at {host}:{os.environ['MASTER_PORT']} "
                    f"within {timeout:g} s, found none ({error}); start rank {ranks[0]}, and set "
                    "TORCHOPT_TOKEN to the same secret on every machine, or nowhere"
                ) from error
            time.sleep(0.05)
            continue
        met.launchers = store
        if rank == ranks[0]:
            met.withdraw = partial(store.delete_key, _ADDRESS)
        return met


def meet_by(
    find: Callable[[], str | bytes],
    publish: Callable[[str], Any],
    host: str,
    rank: int,
    ranks: tuple[int, ...],
    timeout: float,
    *,
    port: int = 0,
) -> Meeting:
    """Return a world whose processes share no files; the hub publishes its address.

    Args:
        find: Returns the published text.
        publish: Publishes a text.
        host: The address of the hub.
        rank: The rank of this process.
        ranks: All ranks; the first is the hub.
        timeout: Seconds to wait for the others.
        port: The port of the hub; 0: any.
    """
    given = os.environ.get(TOKEN)
    if rank == ranks[0]:
        token = given or secrets.token_hex(32)
        listener = _listener(host, port, len(ranks))
        watch = Watch(rank, ranks, timeout, token, listener=listener)
        record = [host, listener.getsockname()[1], "" if given else token]
        met = Meeting(watch, None)
        with met.ends_on_error():
            publish(json.dumps(record))
            watch.wait_for_everyone(timeout)
        return met
    started = time.monotonic()
    strange = 0.0  # since when there was a stranger in each try
    while True:
        host, port, told = json.loads(find())
        token = given or told
        try:
            link = connect((host, port), rank, ranks, token, timeout)
        except (OSError, StrangerError) as error:  # the hub may not listen yet, or end its world
            is_stranger, now = isinstance(error, StrangerError), time.monotonic()
            strange = (strange or now) if is_stranger else 0.0
            if now < (strange + min(timeout, _REOPENING) if is_stranger else started + timeout):
                time.sleep(0.05)
                continue
            if is_stranger:
                raise RuntimeError(
                    f"rank {rank}: expected rank {ranks[0]} at {host}:{port} to know the token of "
                    "this world, found a process that does not; set TORCHOPT_TOKEN to the same "
                    "secret on every machine"
                ) from None
            raise TimeoutError(
                f"rank {rank}: expected rank {ranks[0]} at {host}:{port} within {timeout:g} s, "
                f"found none ({error}); start all processes with the same MASTER_ADDR and "
                "MASTER_PORT, which must be reachable"
            ) from error
        return Meeting(Watch(rank, ranks, timeout, token, hub=link), None)


def _listener(host: str, port: int, backlog: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    deadline = time.monotonic() + _REOPENING
    while True:
        try:
            return socket.create_server((host, port), family=family, backlog=backlog)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                break
            if time.monotonic() > deadline:
                raise OSError(
                    error.errno,
                    f"expected port {port} of {host} to be free for rank 0, found a process that "
                    "listens there; give the world another MASTER_PORT",
                ) from error
        time.sleep(0.05)
    # The address belongs to a gateway: listen on every interface behind it.
    return socket.create_server(("", port), family=family, backlog=backlog)


def require_address(world_size: int) -> None:
    """Raise a `RuntimeError` where the environment has no address to meet at."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise RuntimeError(
                f"expected {name} in the environment of a world of {world_size} processes, found "
                "none; start the script with torchrun, with torchopt.distributed.spawn, or set it"
            )


def launcher_store(rank: int, world_size: int, timeout: float) -> Any:
    """Return the store that the launcher's environment describes."""
    from torch.distributed.rendezvous import rendezvous

    require_address(world_size)
    url = f"env://?rank={rank}&world_size={world_size}"
    store, _, _ = next(rendezvous(url, timeout=timedelta(seconds=timeout)))
    return store
