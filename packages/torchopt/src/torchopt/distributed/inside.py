# SPDX-License-Identifier: Apache-2.0
"""The tasks that a thread is inside of, in which no collective operation is possible."""

from __future__ import annotations

import threading
from collections.abc import Iterable

__all__ = ["own", "require_no_task"]


class _Own(threading.local):
    """The state of one thread.

    Attributes:
        tasks: For each task that it is inside of, the ranks of the group.
    """

    tasks: tuple[tuple[int, ...], ...] = ()


own = _Own()


def require_no_task(ranks: Iterable[int]) -> None:
    """Raise a `RuntimeError` inside a task if others of these ranks run their own tasks."""
    for members in own.tasks:
        if len(common := sorted({*members} & {*ranks})) > 1:
            raise RuntimeError(
                f"expected an operation of ranks {common} outside of their tasks, found one in "
                "a task, where each rank is in another one; in a task compute alone, by a loop "
                "and torch.autograd.grad, or with a group of ranks that share this task"
            )
