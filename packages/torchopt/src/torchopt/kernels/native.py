# SPDX-License-Identifier: Apache-2.0
"""The entry point of the kernels: it checks the tensors and steps them, or returns the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.kernels.devices import refusal, refuse_count, unavailable
from torchopt.kernels.fused_call import FusedCall
from torchopt.kernels.fused_rule import CHAIN_HYPERS, as_number, decays
from torchopt.torch_internals import FakeTensor, in_forward_mode, is_transforming
from torchopt.tree_function import any_watched, is_traced, is_watched, placed_like

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchopt.kernels.fused_rule import FusedRule
    from torchopt.kernels.fused_step import StepCache


__all__ = ["Stepped", "attempt", "overwrite", "update"]

Stepped = tuple[list[Tensor], list[list[Tensor]]]
"""The updates, and the states after the step: a list of tensors for each state of the rule."""


def overwrite(old: Tensor, new: Tensor) -> Tensor:
    """Write `new` into `old` and return it; return `new` if `old` is a leaf that requires grad."""
    if new is old or (old.is_leaf and old.requires_grad):
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


def _constants(
    grads: Sequence[Tensor], steps: int | Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], tuple[int, ...], int]:
    """Return the distinct steps, the index of each gradient's step, and the common step."""
    if isinstance(steps, int):
        return [], (), steps
    if isinstance(steps, Tensor):
        return [steps], (0,) * len(grads), 1
    places: dict[int, int] = {}
    constants: list[Tensor] = []
    order = []
    for count in steps:
        if id(count) not in places:
            places[id(count)] = len(constants)
            constants.append(count)
        order.append(places[id(count)])
    return constants, tuple(order), 1


def attempt(
    rule: FusedRule,
    grads: Sequence[Tensor],
    states: Sequence[list[Tensor]],
    params: Sequence[Tensor] | None,
    steps: int | Tensor | Sequence[Tensor],
    hypers: dict[str, Any] | Sequence[float],
    *,
    maximize: bool = False,
    inplace: bool = False,
    plain: bool = False,
    into: StepCache | None = None,
    launch: bool = True,
) -> Stepped | Exception:
    """Return (updates, states') of one step over all tensors, or the reason why there is none.

    The step is one native call. If it returns a reason, it has changed nothing. The native code
    checks plain tensors on the CPU while it reads them; `refusal` checks all others.

    Args:
        rule: The update rule.
        grads: The gradients.
        states: For each state of the rule, one tensor for each gradient.
        params: The parameters if the step reads them, else None.
        steps: The number of this step, from 1: one for all, or a 0-dim int64 tensor for each
            gradient.
        hypers: The values of `rule.all_hypers`: a sequence of numbers in that order, or numbers and
            tensors with one element by name.
        maximize: Whether to ascend.
        inplace: Whether to write the new state into `states`, whose versions are bumped.
        plain: Whether tensors inside a transform or with a tangent are refused.
        into: If given, the step is written into the states and the parameters, and no updates are
            returned. The checks of the tensors are kept there for the next step.
        launch: With `into`: whether to step now, or only to prepare the step for
            `into.plan.launch`.
    """
    if into is not None:
        if isinstance(hypers, dict):
            return unavailable("a hyper-parameter is watched, or is no plain number")
        refused = into.step(rule, params, grads, states, steps, hypers, maximize, launch)
        return ([], list(states)) if refused is None else refused
    if not grads:
        return [], [[] for _ in states]
    numbers: tuple[float | None, ...] = (
        tuple(_hyper(name, hypers[name]) for name in rule.all_hypers)
        if isinstance(hypers, dict)
        else tuple(hypers)
    )
    read = [("params", params)] if params is not None else []
    every = [*zip(rule.states, states), *read]
    constants, step_of, step = _constants(grads, steps)
    decayed = params is not None
    call = FusedCall(rule, len(grads), decayed, maximize, numbers, step_of, step)
    old = [x for role in states for x in role]
    flat = [*grads, *old, *(params or ())]
    fit = len(states) == len(rule.states) and all(len(role) == len(grads) for _, role in every)
    if fit and not is_followed():
        found = call.quick(call.kind, flat, constants, record=torch.is_grad_enabled())
        if found is not None:
            outputs, graph = found
            if graph:
                outputs = call.differentiable((*flat, *constants), outputs)
            updates, *new = call.roles(outputs, call.num_outputs)
            if inplace and old and not graph:
                # Two calls for all tensors are faster than one that writes after a check of each.
                torch._foreach_copy_(old, list(outputs[len(grads) :]))
                return updates, list(map(list, states))
            return updates, _written(states, new) if inplace else new
    wrong = (refuse_count(constants[place], g) for g, place in zip(grads, step_of))
    refused = refusal(rule, grads, every, plain=plain) or next(filter(None, wrong), None)
    if refused is not None:
        return refused
    if isinstance(hypers, dict):  # copied: they may be written to before the derivative
        learned = [n for n, h in zip(rule.all_hypers, numbers) if h is None]
        flat += [hypers[name].clone().reshape(()) for name in learned]
    flat += constants
    if is_traced() or any(isinstance(x, FakeTensor) for x in flat):
        outputs = call.reference(*flat)  # a compiler fuses the reference implementation itself
    elif call.num_tensor_hypers or any_watched(flat):
        outputs = call.differentiable(flat)
    elif inplace and all(x.is_contiguous() and not x.is_neg() for x in old):
        with torch.no_grad():
            return call.write(flat, states), list(map(list, states))
    else:
        with torch.no_grad():
            outputs = call.value(*flat)
    updates, *new = call.roles(outputs, call.num_outputs)
    return updates, _written(states, new) if inplace else new


def is_followed() -> bool:
    """Return whether a trace, a transform or forward mode is active."""
    return in_forward_mode() or is_transforming() or is_traced()


def _written(states: Sequence[list[Tensor]], new: Sequence[list[Tensor]]) -> list[list[Tensor]]:
    return [list(map(overwrite, *pair)) for pair in zip(states, new)]


def update(
    rule: FusedRule,
    grads: Sequence[Tensor],
    states: Sequence[list[Tensor]],
    params: Sequence[Tensor] | None,
    steps: int | Sequence[Tensor],
    hypers: Mapping[str, Any],
    *,
    maximize: bool = False,
    inplace: bool = False,
) -> Stepped:
    """Return the result of `attempt`; raise if there is none.

    The function is that of the reference implementation `rule.statement`, with the same
    conventions at points that have no derivative. It is differentiable to any order with respect to
    gradients, states, parameters and hyper-parameters that are tensors. The first derivative is one
    native call too, and only the inputs are saved for it. Higher derivatives and forward mode come
    from the reference implementation. float16 and bfloat16 are computed in float32.

    Args:
        rule: The update rule.
        grads: The gradients.
        states: For each state of the rule, one tensor for each gradient.
        params: The parameters; read only for weight decay, or by the rule.
        steps: See `attempt`.
        hypers: A number or a tensor with one element for each name in `rule.all_hypers`.
        maximize: Whether to ascend.
        inplace: See `attempt`.

    Returns:
        (updates, states'). The tensors are new and contiguous. With `inplace`, the new states are
        the tensors of `states` wherever these can be written to.

    Raises:
        KernelUnavailableError: There is no kernel for a dtype, device or layout among `grads`.
        ValueError: Tensors do not match, or hyper-parameters are missing or unknown.
        AssertionError: Weight decay or the rule needs `params`, which are None.

    Example:
        >>> from torchopt.transform.plan import Plan
        >>> hypers = {"lr": 0.5, "weight_decay": 0.0, "decoupled_weight_decay": 0.0}
        >>> update(Plan().fused, [torch.ones(2)], [], None, 1, hypers)[0]
        [tensor([-0.5000, -0.5000])]
    """
    if set(hypers) != set(rule.all_hypers):
        raise ValueError(
            f"fused {rule.name}: expected the hyper-parameters {rule.all_hypers}, "
            f"got {tuple(hypers)}."
        )
    if len(states) != len(rule.states):
        raise ValueError(
            f"fused {rule.name}: expected the states {rule.states}, got {len(states)} of them."
        )
    decayed = rule.reads_params or decays(*(hypers[name] for name in CHAIN_HYPERS[1:]))
    if decayed and params is None:
        reader = "this transformation" if rule.reads_params else "weight decay"
        raise AssertionError(
            f"Parameters are required for {reader}. "
            "Call `update(updates, state, params=params)` instead."
        )
    read = params if decayed else None
    given = rule, grads, states, read, steps, dict(hypers)
    found = attempt(*given, maximize=maximize, inplace=inplace)
    if isinstance(found, Exception):
        raise found
    return found
