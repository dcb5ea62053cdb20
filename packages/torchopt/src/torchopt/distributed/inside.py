# SPDX-License-Identifier: Apache-2.0
"""The tasks in which a thread runs. No collective operation is possible inside them."""

from __future__ import annotations

import threading
from collections.abc import Iterable

__all__ = ["own", "require_no_task"]


class _Own(threading.local):
    """The state of one thread.

    Attributes:
        tasks: The ranks of the group, for each task in which it runs.
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
