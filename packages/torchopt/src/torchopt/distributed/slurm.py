# SPDX-License-Identifier: Apache-2.0
"""The environment of `srun`, as the variables of torchrun."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["adopt", "first_host", "tasks_on_node"]


def adopt(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of torchrun for a process of `srun`; empty for any other process.

    Variables of torchrun that are already set take precedence. A batch script without `srun` is one
    process, whatever the size of the allocation.

    Example:
        >>> adopt({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"})["RANK"]
        '1'
        >>> adopt({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
        {}
    """
    size = environment.get("SLURM_STEP_NUM_TASKS")
    if size is None or "RANK" in environment or "SLURM_PROCID" not in environment:
        return {}
    node = int(environment.get("SLURM_NODEID", "0"))
    on_node = tasks_on_node(environment.get("SLURM_STEP_TASKS_PER_NODE", size), node)
    host = first_host(environment.get("SLURM_STEP_NODELIST", "localhost"))
    job = int(environment.get("SLURM_JOB_ID", "0"))
    step = int(environment.get("SLURM_STEP_ID", "0"))
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(on_node),
        "MASTER_ADDR": "127.0.0.1" if on_node == int(size) else host,
        "MASTER_PORT": str(20000 + (31 * job + step) % 12000),  # below the ephemeral ports
    }
    return {name: environment.get(name, value) for name, value in found.items()}


def tasks_on_node(text: str, node: int) -> int:
    """Return the number of tasks on a node, from `SLURM_STEP_TASKS_PER_NODE`.

    Example:
        >>> [tasks_on_node("2(x3),1", node) for node in range(4)]
        [2, 2, 2, 1]
    """
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]


def first_host(text: str) -> str:
    """Return the first host of a list as slurm writes it.

    Example:
        >>> first_host("gpu[03-05,09]-a,login1"), first_host("one,two")
        ('gpu03-a', 'one')
    """
    found = re.match(r"([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^,]*)", text)
    assert found is not None
    return "".join(part or "" for part in found.groups())
