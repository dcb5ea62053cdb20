# SPDX-License-Identifier: Apache-2.0
"""torch's remote calls, imported on first use.

torch maintains `torch.distributed.rpc` but no longer develops it. Everything else in this package
works without it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch.distributed as dist

from torchopt.distributed import memory
from torchopt.distributed.meeting import Meeting, loopback_interface
from torchopt.torch_internals import rpc_agent_is_set

__all__ = ["agent_is_set", "is_available", "leave", "open_alone", "open_world", "require", "rpc"]

# A call that waits for another call holds a thread, and torch's default of 16 is soon used up.
_THREADS = 128
_SCHEME = "torchopt"


def rpc() -> Any:
    """Return `torch.distributed.rpc`.

    Raises:
        ImportError: This build of torch has none.
    """
    return importlib.import_module("torch.distributed.rpc")


def is_available() -> bool:
    """Return whether torch has remote calls."""
    with contextlib.suppress(ImportError):
        return bool(rpc().is_available())
    return False


def require() -> None:
    """Raise a `RuntimeError` where torch has no remote calls."""
    if not is_available():
        raise RuntimeError(
            "expected a torch with remote calls (torch.distributed.rpc), found one without; use "
            "process groups: auto_init_rpc(backend='collective')"
        )


def agent_is_set() -> bool:
    """Return whether remote calls work now."""
    if not is_available():
        return False
    return rpc_agent_is_set(rpc().api)


def open_alone(name: str) -> None:
    """Let this process call itself, where torch has remote calls."""
    if not is_available() or agent_is_set() or not hasattr(rpc(), "TensorPipeRpcBackendOptions"):
        return
    os.environ.setdefault("TP_SOCKET_IFNAME", loopback_interface())
    # A file instead of an address: launchers change how torch interprets addresses.
    with tempfile.TemporaryDirectory() as folder:
        options = rpc().TensorPipeRpcBackendOptions(init_method=f"file://{folder}/store")
        rpc().init_rpc(name, rank=0, world_size=1, rpc_backend_options=options)


def open_world(
    met: Meeting, name: str, rank: int, world_size: int, backend: Any, options: Any
) -> None:
    """Let the processes of a world call each other."""
    memory.share_arenas()
    if options is None and hasattr(rpc(), "TensorPipeRpcBackendOptions"):
        options = rpc().TensorPipeRpcBackendOptions(num_worker_threads=_THREADS)
    if getattr(options, "init_method", None) == "env://":
        if met.folder is not None:
            options.init_method = f"file://{met.folder}/rpc"
        else:
            _given[_SCHEME] = met.store
            torch_: Any = dist  # it exports no type for the function
            with contextlib.suppress(RuntimeError):  # it is known from the previous world
                torch_.register_rendezvous_handler(_SCHEME, _hand_over)
            options.init_method = f"{_SCHEME}://"
    try:
        rpc().init_rpc(
            name, backend=backend, rank=rank, world_size=world_size, rpc_backend_options=options
        )
    finally:
        _given.clear()


_given: dict[str, Any] = {}  # the store of the ranks, while a world is opened


def _hand_over(url: str, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
    """Give torch the store of the ranks, where its own would listen for everyone."""
    del kwargs
    query = parse_qs(urlparse(url).query)
    yield _given[_SCHEME], int(query["rank"][0]), int(query["world_size"][0])


def leave(orderly: bool) -> None:
    """Shut RPC down; gracefully if all processes call this."""
    if agent_is_set():
        from torchopt.distributed import wire

        rpc().shutdown(graceful=orderly)
        wire.outbox.forget()
        wire.inbox.clear()
