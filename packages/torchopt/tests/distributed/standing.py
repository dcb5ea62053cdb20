# SPDX-License-Identifier: Apache-2.0
"""Worlds that remain open and run the programs of the tests one after the other.

A program that does not break its world does not need a new one, which saves the start.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from distributed_programs import PATIENCE

import torchopt.distributed as todist
from torchopt.distributed.raised import Raised


def serve(address: str, key: bytes) -> None:
    """Run the functions that arrive through a pipe, in one process, until the pipe is closed."""
    with Client(address, authkey=key) as pipe:
        pipe.send(todist.get_rank())
        while True:
            try:
                program, args = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            try:
                outcome = program(*args)
            except Exception as error:
                outcome = Raised(error, todist.get_rank(), program.__name__)
            pipe.send_bytes(pickle.dumps(outcome))


@todist.auto_init_rpc(backend="gloo", timeout=60.0)
def serve_collective(address: str, key: bytes) -> None:
    serve(address, key)


@todist.auto_init_rpc(timeout=60.0)
def serve_rpc(address: str, key: bytes) -> None:
    serve(address, key)


class Standing:
    """A world that remains open.

    Args:
        size: Number of processes.
        backend: `"gloo"` or `"rpc"`.
    """

    def __init__(self, size: int, backend: str) -> None:
        self._ended: list[BaseException] = []
        key = bytes(32)
        with Listener(authkey=key) as listener:
            main = serve_rpc if backend == "rpc" else serve_collective
            self._thread = threading.Thread(
                target=self._spawn, args=(main, size, listener.address, key), daemon=True
            )
            self._thread.start()
            by_rank: dict[int, Connection] = {}
            while len(by_rank) < size:
                pipe = listener.accept()
                by_rank[pipe.recv()] = pipe
                if self._ended:
                    raise self._ended[0]
        self._pipes = [by_rank[rank] for rank in range(size)]

    def _spawn(self, main: Callable[..., Any], size: int, address: str, key: bytes) -> None:
        try:
            todist.spawn(main, size, (address, key), start_method="forkserver")
        except BaseException as error:
            self._ended.append(error)
            with contextlib.suppress(OSError), Client(address, authkey=key) as pipe:
                pipe.send(None)  # no other process joins

    def start(self, program: Callable[..., Any], *args: Any) -> None:
        """Let all processes run a program; `results` returns its results."""
        order = pickle.dumps((program, args))
        for pipe in self._pipes:
            pipe.send_bytes(order)

    def results(self) -> list[Any]:
        """Return the results of the program that was started, by rank."""
        found = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(PATIENCE), f"rank {rank} of {len(self._pipes)} does not end"
            found.append(pickle.loads(pipe.recv_bytes()))
        for outcome in found:
            if isinstance(outcome, Raised):
                raise outcome.as_error()
        return found

    def close(self) -> None:
        """End the processes, in order; raise their pending errors."""
        for pipe in self._pipes:
            pipe.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._ended:
            raise self._ended[0]
