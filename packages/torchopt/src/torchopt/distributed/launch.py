# SPDX-License-Identifier: Apache-2.0
"""Start the processes of a world on this machine, from Python."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torchopt.distributed import guard, meeting
from torchopt.distributed.folder import FOLDER, Folder
from torchopt.distributed.raised import Raised
from torchopt.errors import WorkerError

__all__ = ["spawn"]

_LAST_WORDS = 10.0  # seconds for the others to end by themselves after one failed
_TERMINATED = 2.0  # seconds to end after SIGTERM
_Words = queue.SimpleQueue[tuple["_Worker", "bytes | None"]]

_polling = threading.Lock()  # multiprocessing polls all children whenever it starts one
if hasattr(os, "register_at_fork"):  # another thread may hold it when a process is forked
    os.register_at_fork(after_in_child=lambda: globals().update(_polling=threading.Lock()))


def spawn(
    main: Callable[..., Any],
    nprocs: int,
    args: tuple[Any, ...] = (),
    *,
    env: Mapping[str, str] | None = None,
    start_method: str = "spawn",
    timeout: float | None = None,
) -> list[Any]:
    """Run `main(*args)` in `nprocs` processes on this machine and return what each returned.

    The processes get the environment that torchrun would give them. They find each other through a
    folder that only this user can read and connect over the loopback address, so nothing is
    reachable from other machines and you need not choose a port. If one process fails, all are
    ended; they also end with this process, for whatever reason it ends.

    Args:
        main: A function at the top level of a module; usually decorated with `auto_init_rpc`.
        nprocs: Number of processes, >= 1.
        args: The arguments of `main`, which must be picklable.
        env: Further environment variables for the processes.
        start_method: The start method of multiprocessing: `"spawn"` or `"forkserver"`.
        timeout: Seconds that all processes together may take; None: no limit.

    Returns:
        The results in the order of the ranks; they must be picklable.

    Raises:
        WorkerError: A process raised an exception, was killed, or did not end in time. If several
            failed, it is the error of the lowest rank that raised, else of the first that failed.
        ValueError: `nprocs` is below 1.
        TypeError: `args` is not a tuple.

    Example:
        >>> import torchopt.distributed as todist
        >>> todist.spawn(todist.get_world_rank, 2, start_method="forkserver")
        [0, 1]
    """
    if nprocs < 1:
        raise ValueError(f"`nprocs`: expected at least 1, got {nprocs}.")
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"`args`: expected a tuple of the arguments of `main`, got {type(args).__name__}; of "
            "one argument write (x,)."
        )
    folder = Folder()
    token = secrets.token_hex(32)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # for programs that open a world of torch themselves
    context = multiprocessing.get_context(start_method)
    workers: list[_Worker] = []
    words: _Words = queue.SimpleQueue()
    guarding = _guard(str(folder.path))
    try:
        for rank in range(nprocs):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nprocs),
                "LOCAL_WORLD_SIZE": str(nprocs),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "False",
                FOLDER: str(folder.path),
                meeting.TOKEN: token,
                **(env or {}),
            }
            # As torchrun does: processes that share the cores must not fight over them.
            if nprocs > 1 and "OMP_NUM_THREADS" not in os.environ:
                variables.setdefault("OMP_NUM_THREADS", "1")
            workers.append(_Worker(context, rank, main, args, variables, words))
            with contextlib.suppress(OSError):  # somebody ended the guard
                os.write(guarding.stdin.fileno(), b"%d\n" % workers[-1].process.pid)
        _wait(workers, words, timeout)
    finally:
        _end(workers)
        guarding.kill()
        guarding.communicate()
        folder.leave()
    return [worker.result for worker in workers]


def _guard(folder: str) -> Any:
    """Start the process that acts if this one is killed."""
    command = [sys.executable, "-I", "-S", guard.__file__, folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


class _Worker:
    """A process and the pipe through which it sends its result.

    A thread reads the pipe, because a process can be stopped in the middle of a message.
    """

    def __init__(
        self,
        context: Any,
        rank: int,
        main: Callable[..., Any],
        args: tuple[Any, ...],
        variables: dict[str, str],
        words: _Words,
    ) -> None:
        self.rank = rank
        self.result: Any = None
        self.error: WorkerError | None = None
        self.has_told = False  # whether it has sent the result or error of `main`
        self.done = False
        self._has_ended = False
        self.behind: set[int] = set()  # ranks that it has found to be stuck
        self.pipe, theirs = context.Pipe(duplex=False)
        # The environment must be there before the modules of `main` are imported.
        payload = pickle.dumps((main, args))
        self.process = context.Process(
            target=_child, args=(variables, payload, theirs), name=f"rank {rank}"
        )
        with _polling:
            self.process.start()
        theirs.close()
        threading.Thread(target=self._listen, args=(words,), daemon=True).start()

    def _listen(self, words: _Words) -> None:
        with contextlib.suppress(EOFError, OSError):  # the pipe has ended, maybe inside a message
            while True:
                words.put((self, self.pipe.recv_bytes()))
        words.put((self, None))

    def hear(self, word: bytes | None) -> None:
        """Process one message from the pipe; None means its end."""
        if self.done:
            return
        if word is None:
            self.finish()
            return
        outcome, value = pickle.loads(word)
        self.has_told = self.has_told or outcome != "behind"
        if outcome == "raised":
            self.error = value.as_error(self.rank)
        elif outcome == "behind":
            self.behind = value
        else:
            self.result = value

    def look(self) -> None:
        """Check whether the process is alive: its own children may keep the pipe open."""
        if self.done or _is_alive(self.process):
            return
        if self._has_ended and not self.pipe.poll():
            self.finish()
        self._has_ended = True  # its last message may still arrive

    def finish(self) -> None:
        """Record that the process has ended."""
        self.done = True
        multiprocessing.connection.wait([self.process.sentinel], _LAST_WORDS)
        code = None if _is_alive(self.process) else self.process.exitcode
        if self.error is None and (not self.has_told or (self.result is None and code != 0)):
            how = f"killed by signal {-code}" if code is not None and code < 0 else f"code {code}"
            self.error = WorkerError(self.rank, None, "lost", f"the process ended: {how}")

    def leave_behind(self) -> None:
        """End a process that the others have found to be stuck."""
        if self.done and self.error is None:
            return
        if not self.done:
            self.process.kill()
            self.done = True
        if self.error is None or self.error.kind == "lost":
            text = "the process no longer answered the others, and was ended"
            self.error = WorkerError(self.rank, None, "timed out", text)


def _is_alive(process: Any) -> bool:
    with _polling:
        alive: bool = process.is_alive()
    return alive


def _end(workers: list[_Worker]) -> None:
    """End the processes that still run."""
    running = [worker.process for worker in workers if _is_alive(worker.process)]
    for process in running:
        process.terminate()
    until = time.monotonic() + _TERMINATED
    for process in running:
        multiprocessing.connection.wait([process.sentinel], max(0.0, until - time.monotonic()))
        if _is_alive(process):
            process.kill()
            multiprocessing.connection.wait([process.sentinel])
    for worker in workers:
        worker.pipe.close()
        with _polling:
            worker.process.join()
            worker.process.close()


def _end_with_parent() -> None:
    """End this process when its parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _child(variables: dict[str, str], payload: bytes, pipe: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(variables)
    if "OMP_NUM_THREADS" in variables:
        import torch

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    from torchopt.distributed import session

    try:
        main, args = pickle.loads(payload)
        try:
            result = main(*args)
        except SystemExit as end:
            if end.code:
                raise
            result = None
        # Plain bytes: multiprocessing would hand tensors over as memory of this process.
        pipe.send_bytes(pickle.dumps(("returned", result)))
        pipe.send_bytes(pickle.dumps(("behind", session.close())))
    except Exception as error:
        pipe.send_bytes(pickle.dumps(("raised", Raised(error))))
        pipe.send_bytes(pickle.dumps(("behind", session.close())))
        raise SystemExit(1) from None


def _wait(workers: list[_Worker], words: _Words, timeout: float | None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    failed_at: float | None = None
    while not all(worker.done for worker in workers):
        now = time.monotonic()
        if failed_at is None and any(w.error is not None for w in workers):
            failed_at = now
        if failed_at is not None and now > failed_at + _LAST_WORDS:
            break
        if deadline is not None and now > deadline:
            if failed_at is None:
                late = [w.rank for w in workers if not w.done]
                raise WorkerError(late[0], None, "timed out", f"ranks {late} still run")
            break
        with contextlib.suppress(queue.Empty):
            worker, word = words.get(timeout=0.5)
            worker.hear(word)
        for worker in workers:
            worker.look()
        for rank in set().union(*(worker.behind for worker in workers)):
            workers[rank].leave_behind()
    errors = [w.error for w in workers if w.error is not None]
    if errors:
        # Prefer the error of the process that raised over those that only lost its connection.
        raise min(errors, key=lambda e: (e.kind != "raised", e.task is None))
