# SPDX-License-Identifier: Apache-2.0
"""What the ranks must have in common in a step, and what is said if they have not."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchopt.distributed.group import DifferenceError, Group
from torchopt.distributed.share import digest
from torchopt.errors import WorkerError

if TYPE_CHECKING:
    from torchopt.distributed.task_parallel import TaskParallel

__all__ = ["Signature", "agree", "difference", "local_part"]

_FACTS = ("number of steps", "number of tasks", "weights", "schedule", "parameters", "values")
_REPLICA_CHECK = 100  # steps between two comparisons of the parameters


def local_part(x: Tensor) -> Tensor:
    """Return the part of a tensor that is held here: of a DTensor its shard, else the tensor."""
    to_local = getattr(x, "to_local", None)
    return x if to_local is None else to_local()


class Signature:
    """What this rank is about to do.

    Args:
        engine: Whose step it is.
        params: What is differentiated.
        tasks: Number of tasks.
        weights: As given.

    Attributes:
        meaning: Text that is the same on every rank, unless they do different things.
    """

    def __init__(
        self,
        engine: TaskParallel,
        params: list[Tensor],
        tasks: int,
        weights: Sequence[float] | None,
    ) -> None:
        self._params = params
        self._facts = (
            engine.steps,
            tasks,
            None if weights is None else zlib.crc32(repr(list(weights)).encode()),
            (engine.number, engine.schedule, engine.deterministic, engine.tasks_at_once),
            engine.form_of(params).code,
            self._values(engine),
        )
        self.meaning = "" if engine.group.size == 1 else repr(self._facts)

    def _values(self, engine: TaskParallel) -> int | None:
        if engine.group.size == 1 or (engine.steps != 1 and engine.steps % _REPLICA_CHECK):
            return None
        # Of the values alone: where they lie is not what is compared.
        own = b"".join(digest(local_part(p.detach()).cpu()) for p in self._params)
        return zlib.crc32(own)

    def difference(self, group: Group) -> WorkerError:
        """Return the error that says how the ranks differ; all of them call this."""
        facts: dict[str, Any] = {"operation": "a step of TaskParallel"}
        facts.update(zip(_FACTS, self._facts))
        facts["parameters"] = [(tuple(p.shape), str(p.dtype)) for p in self._params]
        return difference(group, facts)


def agree(group: Group, operation: str) -> None:
    """Make sure that every rank is about to do the same.

    Raises:
        WorkerError: They are not; raised on all of them.
    """
    try:
        group.agree(operation)
    except DifferenceError:
        raise difference(group, {"operation": operation}) from None


def difference(group: Group, facts: dict[str, Any]) -> WorkerError:
    """Return the error that says how the ranks differ; all of them call this."""
    everyone = group.gather_objects(facts, "the search for a difference")
    first = everyone[0]
    for what, expected in first.items():
        differing = [r for r, other in enumerate(everyone) if other.get(what) != expected]
        if differing:
            break
    ranks = [group.ranks[r] for r in differing]
    task = f"step {first['number of steps'] + 1}" if "number of steps" in first else None
    if what == "values":
        text = (
            f"expected the same parameters on every rank, those of ranks {ranks} differ from "
            f"rank {group.ranks[0]}; every rank has to start from the same values and to take "
            "the same optimizer steps"
        )
    else:
        got = everyone[differing[0]].get(what)
        text = (
            f"expected the same {what} on every rank, got {_short(expected)} on rank "
            f"{group.ranks[0]} and {_short(got)} on rank {ranks[0]}"
        )
    return WorkerError(ranks[0], task, "differs", text)


def _short(value: Any) -> str:
    text = f"{len(value)} tensors: {value}" if isinstance(value, list) else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
