# SPDX-License-Identifier: Apache-2.0
"""How many snapshots fit into a budget of bytes."""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from torchopt.diff.explicit.adjoint import gradient, pull_back_steps, unit_cotangents
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.host import is_away
from torchopt.diff.explicit.memory import CountBytes
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.schedule import forward_steps
from torchopt.diff.explicit.step import start, update
from torchopt.diff.explicit.variables import Leaves
from torchopt.diff.surroundings import Surroundings

__all__ = ["in_bytes", "shown", "snapshots_within"]

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*")


def in_bytes(budget: str) -> int | None:
    """Return the bytes of a string such as `"64MiB"`, or None if it is not a number of bytes."""
    found = _BUDGET.fullmatch(budget)
    return None if found is None else int(float(found[1]) * _UNITS[found[2]])


def shown(size: int) -> str:
    """Return a number of bytes, rounded up, as a string that `in_bytes` reads."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= 10 * _UNITS[unit]:
            return f"{-(-size // _UNITS[unit])}{unit}"
    return f"{size}B"


def snapshots_within(call: Call, budget: str, *, beside: int = 1) -> int:
    """Return the largest number of snapshots that keeps a run within a budget.

    The memory of one step and its adjoint is measured in a trial run.

    Args:
        call: The call.
        budget: A string that `in_bytes` can read.
        beside: How many further states exist at the same time, such as the one before the last
            step.

    Raises:
        ValueError: Not even one snapshot fits; the message says how many bytes are needed.
    """
    room = in_bytes(budget)
    assert room is not None
    working, state = _measured(call)
    steps = call.steps - call.first
    fixed = working + beside * state
    # Snapshots on the host take no memory of the device, except the one in use.
    on_host = call.host and any(map(is_away, call.inputs))
    fit = (room - fixed) // state if state else steps
    if fit >= 1 and on_host:
        fit = steps
    if fit < 1:
        least = fixed + state
        every = fixed + steps * state
        raise ValueError(
            f"inner_loop: keep: expected a budget of at least {shown(least)}, got {budget!r}: one "
            f"step takes {shown(working)}, one state {shown(state)}; with {shown(least)} there is "
            f"one snapshot and {forward_steps(steps, 1)} steps forward for {steps}, with "
            f"{shown(every)} every state is kept."
        )
    return min(int(fit), steps)


def _measured(call: Call) -> tuple[int, int]:
    """Return the bytes of a step with its adjoint, and those of a snapshot."""
    inputs = Leaves(call, call.inputs)
    tensors = inputs.constants
    optimizer = call.optimizer_with(tensors)
    seen = Surroundings(call.loss, tensors, beside=call.optimizer).retaken(silent=True)
    with torch.no_grad(), CountBytes() as count:
        carry = start(call, optimizer, tensors).detached()
        with seen.replayed():
            grads, value, aux = gradient(call, carry, tensors, 0)
            after = update(call, optimizer, grads, carry).detached()
        state = sum(x.numel() * x.element_size() for x in after.tensors())
        kept = None
        if call.derivative != "reverse":
            kept = grads
            state += sum(g.numel() * g.element_size() for g in grads if g is not None)
        cotangents = unit_cotangents(after, value, aux)
        moment = Moment(carry, seen, kept)
        del carry, grads, kept, after
        pulled = pull_back_steps(
            replace(call, first=0, judge=call.judge and call.judge.again()),
            moment,
            inputs,
            range(1),
            cotangents,
            seen.replayed,
        )
        del pulled
    # The accumulated cotangents of the inputs live through all steps.
    sums = sum(call.inputs[i].numel() * call.inputs[i].element_size() for i in call.wanted)
    return count.peak + 2 * sums, state
