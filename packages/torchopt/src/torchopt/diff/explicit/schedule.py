# SPDX-License-Identifier: Apache-2.0
"""Which states of a run are kept, and in which order its steps are recomputed and reversed.

To reverse T steps with c snapshots, which include the state before the first step, the least number
of forward steps is

    t(T, c) = r T - C(c + r, r - 1),  where  C(c + r - 1, c) < T <= C(c + r, c),

which solves t(l, s) = min_k k + t(l - k, s - 1) + t(k, s). It includes the run itself, except the
last step, which is reversed from the state before it.

References:
    A. Griewank, A. Walther, Algorithm 799: revolve, ACM Trans. Math. Softw. 26(1), 2000,
    https://doi.org/10.1145/347837.347846
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb

__all__ = ["actions", "forward_steps", "kept_by_the_run"]


def _repetitions(steps: int, snapshots: int) -> int:
    r = 0
    while comb(snapshots + r, snapshots) < steps:
        r += 1
    return r


def forward_steps(steps: int, snapshots: int) -> int:
    """Return t(T, c), the forward steps needed to reverse T = `steps` with c = `snapshots`.

    Example:
        >>> forward_steps(10, 10), forward_steps(10, 3), forward_steps(10, 1)
        (9, 15, 45)
    """
    r = _repetitions(steps, snapshots)
    return r * steps - comb(snapshots + r, r - 1) if r else 0


def _split(steps: int, snapshots: int) -> int:
    """Return after how many steps to take the next snapshot: a k that attains the minimum."""
    r = _repetitions(steps, snapshots)
    return max(
        1,
        comb(snapshots + r - 2, snapshots),
        steps - comb(snapshots + r - 1, snapshots - 1),
    )


Action = tuple[str, int]


def actions(first: int, last: int, snapshots: int) -> Iterator[Action]:
    """Yield the actions that reverse the steps `last - 1`, ..., `first`.

    `("advance", t)`: run forward to the state before step t; `("store", t)`: keep this state;
    `("restore", t)`: return to the kept state before step t; `("reverse", t)`: reverse step t from
    the current state, the one before it; `("free", t)`: drop the kept state. The first state is
    already kept.
    """
    pending = [(first, last, snapshots)]
    present = first
    while pending:
        low, high, free = pending.pop()
        if present != low:
            yield "restore", low
            present = low
        if high - low > 1 and free > 1:
            present = low + _split(high - low, free)
            yield "advance", present
            yield "store", present
            pending += [(low, present, free), (present, high, free - 1)]
            continue
        for t in range(high - 1, low - 1, -1):
            if present > t:
                yield "restore", low
                present = low
            if present < t:
                yield "advance", t
                present = t
            yield "reverse", t
        yield "free", low


def kept_by_the_run(first: int, last: int, snapshots: int) -> tuple[int, ...]:
    """Return the steps before which the run itself takes snapshots, without the first one."""
    kept = []
    for action, t in actions(first, last, snapshots):
        if action == "reverse":
            break
        if action == "store":
            kept.append(t)
    return tuple(kept)
