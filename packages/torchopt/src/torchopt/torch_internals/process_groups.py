# SPDX-License-Identifier: Apache-2.0
"""Functions of torch.distributed without a public name."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import torch

__all__ = [
    "abort_on",
    "collective_options",
    "remove_fsdp_hooks",
    "rpc_agent_is_set",
    "rpc_barrier",
    "store_of",
    "strided_shard",
]


def remove_fsdp_hooks(module: Any) -> None:
    """Remove the hooks with which `fully_shard` gathers the parameters of a module."""
    state = module._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def collective_options(kind: str, timeout: timedelta) -> Any:
    """Return the options of one collective operation, with its time limit.

    Args:
        kind: `"AllreduceOptions"`, `"AllgatherOptions"` or `"BroadcastOptions"`.
        timeout: The time limit.
    """
    from torch._C import _distributed_c10d  # missing in a torch without process groups

    options = getattr(_distributed_c10d, kind)()
    options.timeout = timeout
    return options


def abort_on(group: Any, device: str) -> None:
    """Abort the operations of a process group on a device type, if it has a backend for it."""
    with contextlib.suppress(RuntimeError, ValueError):
        group._get_backend(torch.device(device)).abort()


def rpc_agent_is_set(api: Any) -> bool:
    """Return whether remote calls are available now; `api` is `torch.distributed.rpc.api`."""
    is_set = getattr(api, "_is_current_rpc_agent_set", None)  # missing on Windows
    return is_set is not None and bool(is_set())


def rpc_barrier(api: Any, names: set[str]) -> None:
    """Wait until the named RPC workers have reached this barrier; no names: all workers."""
    everyone = {info.name for info in api._get_current_rpc_agent().get_worker_infos()}
    api._barrier(names or everyone)


def store_of(group: Any) -> Any:
    """Return the store through which the processes of a process group have met."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._world.pg_map[group][1]


def strided_shard(dim: int, split_factor: int) -> Any:
    """Return the placement of a shard that consists of strided parts.

    Parameters that `fully_shard` splits after tensor parallelism have it.
    """
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dim, split_factor=split_factor)
