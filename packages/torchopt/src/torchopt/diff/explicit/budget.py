# SPDX-License-Identifier: Apache-2.0
"""How many snapshots fit into a budget of bytes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchopt.diff.explicit.adjoint import gradient, pull_back_steps, unit_cotangents
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.forward import ForwardRun
from torchopt.diff.explicit.host import is_away
from torchopt.diff.explicit.memory import CountBytes
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.schedule import forward_steps
from torchopt.diff.explicit.step import start, update
from torchopt.diff.explicit.variables import Leaves
from torchopt.diff.surroundings import Surroundings

__all__ = ["in_bytes", "require_within", "shown", "snapshots_within"]

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
    costs = [_measured(call, step) for step in _forms_of_steps(call)]
    working, state, seen, results = map(max, zip(*costs))
    steps = call.steps - call.first
    # Losses and aux are collected, then stacked; later their stacks have cotangents. The
    # surroundings of the start are kept too, and those of a step while the next one is reached.
    fixed = working + beside * state + 2 * call.steps * results + 2 * seen
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


def require_within(run: ForwardRun, budget: str) -> None:
    """Raise if a run that carries tangents needs more than a budget, as a trial of it shows."""
    room, call = in_bytes(budget), run.call
    assert room is not None
    trial, steps = copy.copy(run), min(2, call.steps)
    trial.call = replace(call, steps=steps, first=0)
    seen = Surroundings(call.loss, call.inputs, beside=call.optimizer).retaken(silent=True)
    with torch.no_grad(), CountBytes() as count, seen.replayed():
        carry = trial.outputs_with(ForwardRun.evaluate(trial, *call.inputs)).carry.tensors()
        # Tangents of losses and aux are collected, then stacked.
        rows = sum(_bytes(row[len(carry) :]) for row in trial.tangents)
        state = _bytes(carry)
    later = 2 * rows * (call.steps - steps) // steps
    needed = count.peak + later + state + _bytes(call.inputs[i] for i in call.wanted)
    if needed > room:
        raise ValueError(
            f"inner_loop: keep: expected a budget of at least {shown(needed)}, got {budget!r}: "
            f'derivative="forward" carries {len(trial.tangents)} copies of parameters and state, '
            'one for each scalar that is differentiated; use "reverse" or "mixed", or '
            "differentiate fewer scalars."
        )


class _Cost(NamedTuple):
    """Bytes of one step.

    Attributes:
        working: Of the step with its adjoint.
        state: Of a snapshot, with the surroundings.
        seen: Of the surroundings: buffers, and tensors that the loss may write to.
        results: Of the loss and its aux.
    """

    working: int
    state: int
    seen: int
    results: int


def _forms_of_steps(call: Call) -> list[int]:
    """Return a step for each different form of its batch."""
    found: dict[Any, int] = {}
    for t in range(call.steps):
        inputs = [call.inputs[h.index] for h in call.batch(t).holes()]
        found.setdefault(tuple((x.shape, x.dtype) for x in inputs), t)
    return list(found.values())


def _measured(call: Call, step: int) -> _Cost:
    inputs = Leaves(call, call.inputs)
    tensors = inputs.constants
    optimizer = call.optimizer_with(tensors)
    surroundings = Surroundings(call.loss, tensors, beside=call.optimizer)
    with torch.no_grad(), CountBytes() as count:
        seen = surroundings.retaken(silent=True)
        state = copies = count.now
        with seen.replayed():
            carry = start(call, optimizer, tensors).detached()
            if seen.have_moved():  # an optimizer may draw its state
                seen = surroundings.retaken(silent=True)
            grads, value, aux = gradient(call, carry, tensors, step)
            after = update(call, optimizer, grads, carry).detached()
        state += _bytes(after.tensors())
        kept = None
        if call.derivative != "reverse":
            kept = grads
            state += _bytes(g for g in grads if g is not None)
        results = _bytes([value, *(x for x in aux.leaves if isinstance(x, Tensor))])
        cotangents = unit_cotangents(after, value, aux)
        moment = Moment(carry, seen, kept)
        del carry, grads, kept, after
        pulled = pull_back_steps(
            replace(call, first=0, judge=call.judge and call.judge.again()),
            moment,
            inputs,
            range(step, step + 1),
            cotangents,
            seen.replayed,
        )
        del pulled
    # The accumulated cotangents of the inputs live through all steps.
    sums = _bytes(call.inputs[i] for i in call.wanted)
    return _Cost(count.peak + 2 * sums, state, copies, results)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
