# SPDX-License-Identifier: Apache-2.0
"""Meta-learning on many processes: remote calls, and collective gradients over tasks.

| module | contents |
|---|---|
| `world` | rank and size of the world, `auto_init_rpc` |
| `api` | `parallelize`, remote calls; with `partition`, `reduce` and `wire` |
| `autograd` | gradients through remote calls |
| `task_parallel` | `TaskParallel`: the gradient of a mean over tasks, by all ranks together |
| `sharded` | zero-order estimates that exchange only seeds and losses |
| `checkpoint`, `watch` | runs that can be resumed; failures that are reported |
| `launch` | `spawn`: the processes of a world, from Python |

A remote call runs code that a peer sends, so the processes of a world must be on a trusted network.
If all processes run on one machine, they use the loopback interface.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

if not dist.is_available():
    raise ImportError(
        "torchopt.distributed: expected a torch built with torch.distributed, found one without. "
        "Everything else in torchopt works; for this part install a build with USE_DISTRIBUTED=1."
    )

from torchopt.distributed import api, autograd, remote, world
from torchopt.distributed.api import (
    TensorDimensionPartitioner,
    batch_partitioner,
    dim_partitioner,
    mean_reducer,
    parallelize,
    parallelize_async,
    parallelize_sync,
    remote_async_call,
    remote_sync_call,
    sum_reducer,
)
from torchopt.distributed.checkpoint import Checkpoint
from torchopt.distributed.launch import spawn
from torchopt.distributed.reduce import WeightedReducer, weighted_mean_reducer
from torchopt.distributed.sharded import zero_order
from torchopt.distributed.share import Shared, share
from torchopt.distributed.stats import WireStats, wire_stats
from torchopt.distributed.task_parallel import MetaStep, TaskParallel
from torchopt.distributed.world import (
    WorldInfo,
    auto_init_rpc,
    barrier,
    driver,
    get_backend,
    get_local_rank,
    get_local_world_size,
    get_rank,
    get_worker_id,
    get_world_info,
    get_world_rank,
    get_world_size,
    not_on_rank,
    on_rank,
    rank_non_zero_only,
    rank_zero_only,
    shutdown,
)

__all__ = [
    "Checkpoint",
    "MetaStep",
    "Shared",
    "TaskParallel",
    "TensorDimensionPartitioner",
    "WeightedReducer",
    "WireStats",
    "WorldInfo",
    "auto_init_rpc",
    "barrier",
    "batch_partitioner",
    "dim_partitioner",
    "driver",
    "get_backend",
    "get_local_rank",
    "get_local_world_size",
    "get_rank",
    "get_worker_id",
    "get_world_info",
    "get_world_rank",
    "get_world_size",
    "is_available",
    "mean_reducer",
    "not_on_rank",
    "on_rank",
    "parallelize",
    "parallelize_async",
    "parallelize_sync",
    "rank_non_zero_only",
    "rank_zero_only",
    "remote_async_call",
    "remote_sync_call",
    "share",
    "shutdown",
    "spawn",
    "sum_reducer",
    "weighted_mean_reducer",
    "wire_stats",
    "zero_order",
]


def is_available() -> bool:
    """Return whether torch has process groups, remote calls and distributed autograd."""
    return dist.is_available() and remote.is_available() and autograd.is_available()


def __getattr__(name: str) -> Any:
    if name == "rpc":
        return remote.rpc()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
