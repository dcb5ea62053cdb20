# SPDX-License-Identifier: Apache-2.0
"""The inputs of a call that the program of some steps uses, and their cotangents."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.adjoint import Cotangents, pull_back_steps
from torchopt.diff.explicit.call import Call, Hole
from torchopt.diff.explicit.forms import fixed, present
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.step import Carry
from torchopt.diff.explicit.variables import AtStep, Input, Leaves

__all__ = [
    "add_up",
    "holes_at",
    "inputs_key",
    "inputs_of",
    "pulled_flat",
    "read_pulled",
    "tensors_at",
    "with_given",
]


def holes_at(call: Call, step: int) -> list[Hole]:
    """Return the inputs that a step uses."""
    return [*call.used_at(step), *(Hole(i) for i in call.hypers)]


def inputs_of(call: Call, steps: range) -> list[Input]:
    """Return the inputs that steps use, each once."""
    key = None if call.alike else steps
    found: list[Input] | None = call.taken.get(key)
    if found is None:
        holes = ((h.index, t if h.by_step else None) for t in steps for h in holes_at(call, t))
        call.taken[key] = found = list(dict.fromkeys(holes))
    return found


def tensors_at(call: Call, tensors: Sequence[Tensor], steps: range) -> list[Tensor]:
    """Return the tensors of the inputs that steps use."""
    return [tensors[i] if t is None else tensors[i][t] for i, t in inputs_of(call, steps)]


def with_given(call: Call, given: Sequence[Tensor], steps: range) -> list[Any]:
    """Return a list like the inputs of a call, with `given` for those that steps use."""
    out: list[Any] = [x.detach() for x in call.inputs]
    for (i, t), x in zip(inputs_of(call, steps), given):
        if t is None:
            out[i] = x
        else:
            out[i] = AtStep.of(out[i])
            out[i].slices[t] = x
    return out


def inputs_key(call: Call, step: int) -> Hashable:
    """Return the properties of the inputs that the program of a step depends on."""
    wanted, batch = set(call.wanted), call.batch(step)
    inputs = [
        (
            x.shape[1:] if h.by_step else x.shape,
            x.dtype,
            x.device,
            x.stride() if x.layout is torch.strided else x.layout,
            h.by_step,
            h.index in wanted,
            call.dims[h.index],
        )
        for h, x in ((h, call.inputs[h.index]) for h in holes_at(call, step))
    ]
    return batch.spec, batch.orders, fixed(batch.leaves), tuple(inputs)


def pulled_flat(
    call: Call,
    seen: Sequence[tuple[Carry, Sequence[Any] | None]],
    full: list[Any],
    steps: range,
    cotangents: Cotangents,
) -> tuple[list[Tensor], tuple[list[bool], list[int]]]:
    """Return the cotangents of the carry and of the inputs, without None, and their positions.

    Args:
        call: The call, with the derivative to take.
        seen: The state before each step, and its gradient if it is kept.
        full: The inputs of the call.
        steps: The steps.
        cotangents: The cotangents of the results of the steps.
    """
    smooth, by_input = cotangents.carry, dict[Input, Tensor]()
    for (before, grads), losses, t in reversed(list(zip(seen, cotangents.losses, steps))):
        smooth, more = pull_back_steps(
            call,
            Moment(before, None, None if grads is None else [*grads]),  # type: ignore[arg-type]
            Leaves(call, full),
            range(t, t + 1),
            Cotangents(smooth, [losses]),
            contextlib.nullcontext,
        )
        add_up(by_input, more)
    places = {taken: k for k, taken in enumerate(inputs_of(call, steps))}
    form = [c is not None for c in smooth], [places[i] for i in by_input]
    return [*present(smooth), *by_input.values()], form


def add_up(total: dict[Input, Tensor], more: dict[Input, Tensor]) -> None:
    """Add the cotangents of inputs to those in `total`."""
    for i, c in more.items():
        total[i] = total[i] + c if i in total else c


def read_pulled(
    call: Call, found: Sequence[Tensor], has: Sequence[bool], places: Sequence[int], steps: range
) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
    """Return the results of `pulled_flat` as lists with None for zeros, and by input."""
    remaining, taken = iter(found), inputs_of(call, steps)
    out = [next(remaining) if p else None for p in has]
    return out, dict(zip((taken[k] for k in places), remaining))
