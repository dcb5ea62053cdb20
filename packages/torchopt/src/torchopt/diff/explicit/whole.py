# SPDX-License-Identifier: Apache-2.0
"""The programs of some steps and of their adjoint, from one common trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchopt.diff.explicit.adjoint import Cotangents, gradient
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.forms import Form, Pull, distinct_tensors, present
from torchopt.diff.explicit.packing import Packing
from torchopt.diff.explicit.step import Carry, update
from torchopt.diff.explicit.taken import pulled_flat, with_given
from torchopt.diff.explicit.trace import Program, Words, make_trace
from torchopt.diff.surroundings import Surroundings
from torchopt.torch_internals import draws_numbers, prepare_compiler, repeats_removed

__all__ = ["results_of", "whole_program"]


def results_of(
    call: Call, before: Carry, full: list[Any], steps: range, *, with_gradient: bool
) -> tuple[list[Tensor], Form, list[tuple[Carry, list[Any]]]]:
    """Return the resulting tensors of steps, their form, and all states and gradients."""
    after, optimizer = before, call.optimizer_with(full)
    values, aux, seen = [], [], []
    for t in steps:
        grads, value, extra = gradient(call, after, full, t)
        seen.append((after, grads))
        values.append(value)
        aux.append(extra)
        after = update(call, optimizer, grads, after).detached()
    returned = grads if with_gradient else [None] * len(grads)
    others = [x for a in aux for x in a.leaves if isinstance(x, Tensor)]
    distinct, _ = distinct_tensors(after.tensors())
    form = Form.of(before, after, aux, returned)
    return [*distinct, *values, *others, *present(returned)], form, seen


def whole_program(
    call: Call,
    carry: Carry,
    given: list[Tensor],
    steps: range,
    surroundings: Surroundings,
    words: Words,
    *,
    compiled: bool,
) -> Program | None:
    """Return the program of steps, which saves the tensors for their adjoint.

    The form of the program contains the adjoint. None if the loss draws random numbers or anything
    is written in place, because parts of the program run later than others.

    Args:
        call: The call.
        carry: Parameters and state before the steps.
        given: The distinct tensors of the carry, and the inputs that the steps take.
        steps: The numbers of the steps.
        surroundings: The state that the loss sees besides its arguments.
        words: Words for messages.
        compiled: Whether the programs are compiled.
    """
    if compiled:
        prepare_compiler()
    once, where = distinct_tensors(carry.tensors())

    def stepped(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        before = carry.with_tensors([tensors[i] for i in where])
        full = with_given(call, tensors[len(once) :], steps)
        return full, *results_of(call, before, full, steps, with_gradient=False)

    with surroundings.retaken().replayed():
        _, results, form, _ = stepped(given)
        like = [torch.zeros_like(x) for x in form.read(results)[0].smooth]
    end = max(form.where) + 1
    packing = Packing.of(once)
    packed = compiled and form.stable and packing == Packing.of(results[:end])
    packing = packing if packed else Packing(len(once))
    after = packing if packed else Packing(end)
    smooth = Packing.of(like) if packed else Packing(len(like))
    size = packing.count + len(given) - len(once)

    def joint(*flat: Tensor) -> tuple[list[Tensor], Any]:
        before = [*packing.unpacked(flat[: packing.count]), *flat[packing.count : size]]
        full, results, form, seen = stepped(before)
        nothing: list[list[Tensor | None]] = [[None] * (1 + len(a.smooth)) for a in form.aux]
        given_back = smooth.unpacked(flat[size:])
        here = Cotangents([*given_back], nothing)
        found, (has, places) = pulled_flat(call, seen, full, steps, here)
        if packed:
            remaining = iter(found)
            both = zip(has, given_back)
            dense = [next(remaining) if h else torch.zeros_like(x) for h, x in both]
            found, has = [*smooth.packed(dense), *remaining], [True] * len(has)
        results = [*after.packed(results[:end]), *results[end:]]
        return [*results, *found], (len(results), form, (has, places))

    reach = call.loss, call.optimizer
    with surroundings.retaken().replayed():
        states = surroundings.retaken()
        examples = [*packing.packed(once), *given[len(once) :], *smooth.packed(like)]
        trace = make_trace(joint, examples, reach, words, states=states)
        if trace.writes or draws_numbers(trace.graph) or not repeats_removed(trace.graph):
            return None
        count, form, (has, places) = trace.form
        cotangents = range(size, size + smooth.count)
        program, pull = trace.parted(count, cotangents, words, compiled=compiled)
    if packed:
        program = replace(program, taken=packing, given=packing)
        pull = replace(pull, taken=smooth, given=smooth)
    return replace(program, form=replace(form, pull=Pull(pull, has, places)))
