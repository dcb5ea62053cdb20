# SPDX-License-Identifier: Apache-2.0
"""Facts that must be the same on all ranks in a step, and the error if they differ."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.distributed.group import Group
from torchopt.distributed.packet import DifferenceError, Packet
from torchopt.distributed.share import digest
from torchopt.errors import WorkerError

if TYPE_CHECKING:
    from torchopt.distributed.task_parallel import Form, TaskParallel

__all__ = ["Signature", "agree", "difference", "gradient_dtype", "kinds_of", "local_part", "refuse"]

_FACTS = ("number of steps", "number of tasks", "weights", "settings", "parameters", "values")
_REPLICA_CHECK = 100  # steps between two comparisons of the parameters


def gradient_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the gradients of a tensor: a newer torch lets a leaf have another one."""
    own: torch.dtype | None = getattr(p, "grad_dtype", None) if p.is_leaf else None
    return own or p.dtype


def local_part(x: Tensor) -> Tensor:
    """Return the shard of a DTensor that this process holds; any other tensor as it is."""
    to_local = getattr(x, "to_local", None)
    return x if to_local is None else to_local()


class Signature:
    """The step that this rank is about to take.

    Args:
        engine: The engine that takes the step.
        form: What follows from the shapes and dtypes of the parameters.
        params: The parameters that are differentiated.
        tasks: The number of tasks.
        weights: The weights of the tasks, as the caller gave them.

    Attributes:
        meaning: A text that is the same on every rank unless they do different things.
    """

    def __init__(
        self,
        engine: TaskParallel,
        form: Form,
        params: list[Tensor],
        tasks: int,
        weights: Sequence[float] | None,
    ) -> None:
        self._params, self._places = params, form.places
        self._facts = (
            engine.steps,
            tasks,
            None if weights is None else zlib.crc32(repr(list(weights)).encode()),
            f"engine {engine.number + 1}: {engine.schedule}, deterministic={engine.deterministic}, "
            f"tasks_at_once={engine.tasks_at_once}, bucket_bytes={engine.bucket_bytes}, "
            f"seed={engine.seed}, sparse {form.sparse}",
            form.code,
            self._values(engine),
        )
        self.meaning = "" if engine.group.size == 1 else str(self._facts)

    def _values(self, engine: TaskParallel) -> int | None:
        if engine.group.size == 1 or (engine.steps != 1 and engine.steps % _REPLICA_CHECK):
            return None
        # On the CPU, so that equal values on different devices have the same digest.
        own = b"".join(digest(local_part(x.detach()).cpu()) for x in engine.replicas(self._params))
        return zlib.crc32(own)

    def difference(self, group: Group) -> WorkerError:
        """Return the error that says how the ranks differ; all of them call this."""
        facts: dict[str, Any] = {"operation": "a step of TaskParallel"}
        facts.update(zip(_FACTS, self._facts))
        facts["parameters"] = kinds_of(self._params)
        facts["places of the parameters among all leaves"] = str(self._places)
        facts["values"] = facts.pop("values")  # the last to be compared
        return difference(group, facts)


def kinds_of(tensors: Sequence[Tensor]) -> list[str]:
    """Return dtypes and shapes as text."""

    def kind(x: Tensor) -> str:
        own, of_gradient = (str(t).partition(".")[2] for t in (x.dtype, gradient_dtype(x)))
        more = f" with gradients of {of_gradient}" if of_gradient != own else ""
        return f"{own} {list(x.shape)}{more}"

    return [kind(x) for x in tensors]


def agree(
    group: Group,
    operation: str,
    facts: dict[str, Any] | None = None,
    numbers: Sequence[float] = (),
) -> Tensor:
    """Check that all ranks are about to do the same thing, and return the sums of some numbers.

    Args:
        group: The ranks.
        operation: What they are about to do, in words.
        facts: Further facts that have to be the same.
        numbers: A few numbers to sum over the ranks.

    Raises:
        WorkerError: They differ; raised on all ranks.
    """
    if group.size == 1:
        return torch.tensor(numbers)
    facts = {"operation": operation, **(facts or {})}
    try:
        return Packet(group, repr(facts), numbers).sums(operation, group.timeout)
    except DifferenceError:
        raise difference(group, facts) from None


def refuse(group: Group, error: Exception, steps: int) -> None:
    """Tell the other ranks, which may be about to begin a step, that this one cannot."""
    if group.size == 1:
        return
    facts = {
        "operation": f"no step ({type(error).__name__}: {error})",
        "number of steps": steps,
    }
    with contextlib.suppress(WorkerError):
        try:
            Packet(group, repr(facts)).sums("the begin of a step", group.timeout)
        except DifferenceError:
            difference(group, facts)


def difference(group: Group, facts: dict[str, Any]) -> WorkerError:
    """Return the error that says how the ranks differ; all of them call this."""
    everyone = group.gather_objects(facts, "the search for a difference")
    for what in everyone[0]:
        values = [other.get(what) for other in everyone]
        expected = max(values, key=values.count)  # the most frequent value; the first of several
        differing = [r for r, value in enumerate(values) if value != expected]
        if differing:
            break
    ranks = [group.ranks[r] for r in differing]
    usual = values.index(expected)
    task = None
    if "number of steps" in everyone[usual]:
        task = f"step {everyone[usual]['number of steps'] + 1}"
    if what == "values":
        text = (
            f"expected the same parameters and buffers on every rank, those of ranks {ranks} "
            f"differ from rank {group.ranks[usual]}; every rank has to start from the same values "
            "and to take the same optimizer steps"
        )
    else:
        one, other = _apart(expected, values[differing[0]])
        text = (
            f"expected the same {what} on every rank, got {one} on rank {group.ranks[usual]} and "
            f"{other} on rank {ranks[0]}"
        )
    return WorkerError(ranks[0], task, "differs", text)


def _apart(one: Any, other: Any) -> tuple[str, str]:
    """Return two values as short texts that show the difference."""
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{len(one)} tensors", f"{len(other)}"
        k = next(k for k, (a, b) in enumerate(zip(one, other)) if a != b)
        return f"{one[k]} as number {k + 1}", f"{other[k]}"
    return _short(one), _short(other)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 150 else f"{text[:147]}..."
