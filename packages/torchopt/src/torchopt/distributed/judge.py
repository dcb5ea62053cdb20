# SPDX-License-Identifier: Apache-2.0
"""Decide which process failed, from what each process does and since when."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torchopt.errors import WorkerError

__all__ = ["SILENCE", "Doing", "Verdict", "View", "judge"]

SILENCE = 1.5  # seconds: several beats
_TELLING = 0.5  # seconds that an overdue process has to report itself
_LEAVING = 1.5  # seconds after a goodbye during which others may still wait for the process


class Doing(NamedTuple):
    """What the main thread of a process is doing.

    Attributes:
        kind: `"task"`: runs a task of the caller; `"operation"`: waits for `ranks`; `"end"`: has
            left, or is the hub and waits for the others to leave; `"other"`.
        name: What it does, in words.
        limit: Seconds that a task may take, or that other ranks may take to reach an operation.
        ranks: The ranks that take part in an operation.
        since: When it began, by the clock of the judging process.
    """

    kind: str
    name: str | None
    limit: float
    ranks: tuple[int, ...]
    since: float


class View:
    """What is known about a process.

    Args:
        now: The time.

    Attributes:
        doing: What it does.
        heard: When its last heartbeat came.
        left: When it said goodbye; 0 before.
    """

    def __init__(self, now: float) -> None:
        self.heard = now
        self.doing = Doing("other", None, 0.0, (), now)
        self.left = 0.0

    def leave(self, now: float) -> None:
        """Record that it said goodbye."""
        self.left = self.left or now


class Verdict(NamedTuple):
    """Who failed; see `WorkerError`.

    Attributes:
        silent: Whether its heartbeats have stopped, so that there is no point in asking it.
        words: What is wrong, if the kind does not say it.
    """

    rank: int | None
    task: str | None
    kind: str
    silent: bool = False
    words: str = ""

    def error(self, stands: str) -> WorkerError:
        """Return the error, with the stack of the process."""
        return WorkerError(self.rank, self.task, self.kind, stands or self.words)


def judge(views: Mapping[int, View], now: float, timeout: float, own: int) -> Verdict | None:
    """Return who failed, or None.

    A process that is alive and makes progress never fails, however slow it is. A process fails if

    - it has left while another process waits for it in an operation;
    - it has been in the same place, outside an operation, for as long as another process has
      waited for it, and longer than the limit of that operation (a task has its own limit);
    - it sends no heartbeat, and is past the limit of its task, or has been silent for longer than
      an operation that waits for it may take, or for longer than `timeout`.

    Args:
        views: What is known about each process, by rank.
        now: The time, in seconds.
        timeout: Longest time without a heartbeat, in seconds.
        own: The judging rank.
    """
    waiting = {
        rank: view
        for rank, view in views.items()
        if view.doing.kind == "operation" and not view.left and rank in view.doing.ranks
    }
    for rank, view in views.items():
        waits = [other for r, other in waiting.items() if r != rank and rank in other.doing.ranks]
        if view.left:
            late = [w for w in waits if min(w.heard, now) > view.left + _LEAVING]
            if late:
                return Verdict(rank, view.doing.name, "left")
            continue
        silent = now - view.heard
        if view.doing.kind == "task":
            overdue = now > view.doing.since + view.doing.limit + _TELLING
        else:
            overdue = silent > timeout or any(
                min(now - w.doing.since, silent) > w.doing.limit for w in waits
            )
        if rank != own and silent > SILENCE and overdue:
            return Verdict(rank, view.doing.name, "timed out", silent=True)
        if view.doing.kind == "other" and any(
            min(now - w.doing.since, now - view.doing.since) > w.doing.limit for w in waits
        ):
            return Verdict(rank, view.doing.name, "timed out")
    return _unfinished(waiting, views, now)


def _unfinished(
    waiting: Mapping[int, View], views: Mapping[int, View], now: float
) -> Verdict | None:
    """Return the verdict on ranks that all wait for one another, or None."""
    for first, view in waiting.items():
        circle, new = {first}, set(view.doing.ranks)
        while new:
            circle |= new
            known = [waiting[rank].doing for rank in new if rank in waiting]
            new = {rank for doing in known for rank in doing.ranks} - circle
        if any(rank not in waiting or rank not in views for rank in circle):
            continue  # one of them still computes and will arrive
        present = {rank: waiting[rank] for rank in sorted(circle)}
        # What a process does is known only up to its last heartbeat.
        waited = min(min(p.heard, now) - p.doing.since for p in present.values())
        if waited > view.doing.limit:
            return _verdict_on({rank: p.doing.name for rank, p in present.items()})
    return None


def _verdict_on(places: Mapping[int, str | None]) -> Verdict:
    """Return the verdict on ranks that all wait, given the operation that each waits in."""
    names = list(places.values())
    usual = max(names, key=names.count)  # the most frequent; the first of several
    other = next((rank for rank, name in places.items() if name != usual), None)
    if other is None:
        return Verdict(None, usual, "timed out", silent=True)
    where = next(rank for rank, name in places.items() if name == usual)
    words = (
        f"expected every rank to reach the same operation, rank {where} waits in {usual} and "
        f"rank {other} in {places[other]}"
    )
    return Verdict(other, places[other], "differs", words=words)
