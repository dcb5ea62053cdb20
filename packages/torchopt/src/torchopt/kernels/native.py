# SPDX-License-Identifier: Apache-2.0
"""The entry point of the kernels: it checks the tensors and steps them, or returns the reason."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchopt import _C
from torchopt.kernels.devices import refusal, refuse_count, unavailable
from torchopt.kernels.fused_call import FusedCall
from torchopt.kernels.fused_rule import FusedRule, as_number
from torchopt.kernels.fused_step import StepCache
from torchopt.kernels.missing import why_missing
from torchopt.torch_internals import (
    FakeTensor,
    bump_versions,
    foreach_copy_,
    in_forward_mode,
    is_transforming,
)
from torchopt.tree_function import any_watched, are_unfollowed, is_traced, is_watched, placed_like

__all__ = ["Stepped", "attempt", "call", "is_writable", "overwrite"]

Stepped = tuple[list[Tensor], list[list[Tensor]]]
"""The updates, and the states after the step: a list of tensors for each state of the rule."""


def is_writable(old: Tensor) -> bool:
    """Return whether a step in place writes into `old`: not if it is a leaf that requires grad."""
    return not (old.is_leaf and old.requires_grad)


def overwrite(old: Tensor, new: Tensor) -> Tensor:
    """Write `new` into `old` and return it; return `new` if `old` is not writable."""
    if new is old or not is_writable(old):
        return new
    return old.copy_(placed_like(old, new))


def _hyper(name: str, value: Any) -> float | None:
    if not isinstance(value, torch.Tensor):
        return as_number(name, value)
    if value.numel() != 1 or value.is_complex():
        raise ValueError(
            f"{name}: expected a number or a real tensor with one element, got a tensor of shape "
            f"{tuple(value.shape)} and {value.dtype}."
        )
    if not value.is_floating_point():
        return as_number(name, value)
    unread = value.is_meta or is_traced() or is_watched(value)
    return None if unread else as_number(name, value)


def attempt(
    rule: FusedRule,
    grads: Sequence[Tensor],
    states: Sequence[list[Tensor]],
    params: Sequence[Tensor] | None,
    step: int | Tensor,
    hypers: dict[str, Any] | Sequence[float],
    *,
    maximize: bool = False,
    inplace: bool = False,
    plain: bool = False,
    into: StepCache | None = None,
    launch: bool = True,
    checked: bool = False,
) -> Stepped | Exception:
    """Return (updates, states') of one step over all tensors, or the reason why there is none.

    The step is one native call. If it returns a reason, it has changed nothing. The native code
    checks plain tensors on the CPU while it reads them; `refusal` checks all others.

    The function is that of the reference implementation `rule.statement`, with the same
    conventions at points that have no derivative. It is differentiable to any order with respect to
    gradients, states, parameters and hyper-parameters that are tensors. The first derivative is one
    native call too, and only the inputs are saved for it. Higher derivatives and forward mode come
    from the reference implementation. float16 and bfloat16 are computed in float32.

    Args:
        rule: The update rule.
        grads: The gradients.
        states: For each state of the rule, one tensor for each gradient.
        params: The parameters if the step reads them, else None.
        step: The number of this step, from 1, or a 0-dim int64 tensor with it.
        hypers: The values of `rule.all_hypers`: a sequence of numbers in that order, or numbers and
            tensors with one element by name.
        maximize: Whether to ascend.
        inplace: Whether to write the new state into `states`, whose versions are bumped.
        plain: Whether tensors inside a transform or with a tangent are refused.
        into: If given, the step is written into the states and the parameters, and no updates are
            returned. The checks of the tensors are kept there for the next step.
        launch: With `into`: whether to step now, or only to prepare the step for
            `into.plan.launch`.
        checked: Whether the caller has checked that nothing is traced, and that states and
            parameters have one tensor for each gradient.
    """
    if into is not None:
        if isinstance(hypers, dict):
            return unavailable("a hyper-parameter is watched, or is not a plain number")
        refused = into.step(rule, params, grads, states, step, hypers, maximize, launch)
        return ([], list(states)) if refused is None else refused
    if not grads:
        return [], [[] for _ in states]
    assert len(states) == len(rule.states)
    size = len(grads)
    flat = list(grads)
    for role in states if params is None else (*states, params):
        flat += role
    numbers: Any = hypers
    if isinstance(hypers, dict):
        numbers = tuple(_hyper(name, hypers[name]) for name in rule.all_hypers)
    given = rule, size, params is not None, maximize, numbers, step
    if (
        (checked or (_are_alike(size, states, params) and not is_traced()))
        and not (isinstance(hypers, dict) and None in numbers)
        and not in_forward_mode()
        and not is_transforming()
    ):
        kind = _C.UPDATE if params is None else _C.DECAYED_UPDATE
        threads, record = torch.get_num_threads(), torch.is_grad_enabled()
        found: Any = _C.fused_call(
            rule.name, kind, flat, size, None, step, numbers, maximize, threads, record
        )
        if found is not None:
            outputs, graph = found
            if graph:
                last = [step] if isinstance(step, Tensor) else []
                outputs = FusedCall(*given).differentiable((*flat, *last), outputs)
            updates, *new = [list(outputs[k : k + size]) for k in range(0, len(outputs), size)]
            if not (inplace and new):
                return updates, new
            old = flat[size : size + size * len(new)]
            # Under no_grad, leaves that require a gradient have no graph either.
            if graph or not (record or all(map(is_writable, old))):
                return updates, _written(states, new)
            # Two calls for all tensors are faster than one that writes after a check of each.
            foreach_copy_(old, list(outputs[size:]))
            return updates, list(map(list, states))
    constants = [step] if isinstance(step, Tensor) else []
    fused = FusedCall(*given)
    every: list[tuple[str, Sequence[Tensor]]] = [*zip(rule.states, states)]
    if params is not None:
        every.append(("params", params))
    wrong = (refuse_count(count, g) for count in constants for g in grads)
    refused = refusal(rule, grads, every, plain=plain) or next(filter(None, wrong), None)
    if refused is not None:
        return refused
    old = [x for role in states for x in role]
    if isinstance(hypers, dict):  # copied: they may be written to before the derivative
        learned = [n for n, h in zip(rule.all_hypers, numbers) if h is None]
        flat += [hypers[name].clone().reshape(()) for name in learned]
    flat += constants
    if is_traced() or any(isinstance(x, FakeTensor) for x in flat):
        outputs = fused.reference(*flat)  # a compiler fuses the reference implementation itself
    elif fused.num_tensor_hypers or any_watched(flat):
        outputs = fused.differentiable(flat)
    else:
        written = inplace and all(map(is_writable, old)) and _C.are_disjoint(old)
        with torch.no_grad():
            outputs = fused.value(*flat, into=states if written else None)
    updates, *new = fused.roles(outputs, fused.num_outputs)
    return updates, _written(states, new) if inplace else new


def call(
    name: str,
    roles: Sequence[Sequence[Tensor]],
    *rest: Any,
    written: Sequence[Sequence[Tensor]] = (),
) -> Any:
    """Return the results of a kernel that is not a rule, or None for unsupported tensors.

    It supports only plain tensors on the CPU without a graph or a transform. If it returns None, it
    has changed nothing.

    Args:
        name: The name of the kernel in the extension.
        roles: Its first arguments, lists of tensors.
        rest: The further arguments, without the number of threads.
        written: The lists that it writes to, whose versions are bumped.
    """
    if why_missing(_C) is not None or not are_unfollowed(*roles):
        return None
    if written and not all(map(is_writable, itertools.chain(*written))):
        return None
    found = getattr(_C, name)(*roles, *rest, torch.get_num_threads())
    if found is not None and written:
        bump_versions([x for role in written for x in role])
    return found


def _are_alike(size: int, states: Sequence[list[Tensor]], params: Sequence[Tensor] | None) -> bool:
    """Return whether each role has `size` tensors."""
    return {size, *map(len, states), size if params is None else len(params)} == {size}


def _written(states: Sequence[list[Tensor]], new: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    return [list(map(overwrite, *pair)) for pair in zip(states, new)]
