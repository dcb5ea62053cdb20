# SPDX-License-Identifier: Apache-2.0
"""The entry point of the kernels: tensors are checked once, and stepped or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt import _C
from torchopt.errors import KernelUnavailableError
from torchopt.kernels.devices import explain_unavailable
from torchopt.kernels.fused_call import FusedCall
from torchopt.kernels.fused_rule import as_number, decays
from torchopt.torch_internals import (
    FakeTensor,
    has_tangent,
    in_forward_mode,
    is_wrapped,
)
from torchopt.tree_function import PLAIN, any_watched, is_traced, is_watched, placed_like

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchopt.kernels.fused_rule import FusedRule


__all__ = ["call_plain", "overwrite", "refusal", "unavailable", "update"]


def overwrite(old: Tensor, new: Tensor) -> Tensor:
    """Write `new` into `old` where that is possible: not into a leaf that requires a gradient."""
    if new is old or (old.is_leaf and old.requires_grad):
        return new
    return old.copy_(placed_like(old, new))


def refusal(
    rule: FusedRule,
    grads: Sequence[Tensor],
    roles: Sequence[tuple[str, Sequence[Tensor]]],
    *,
    plain: bool = False,
) -> Exception | None:
    """Return why no kernel serves these tensors, None where one does.

    Args:
        rule: What is to be computed.
        grads: The gradients.
        roles: Names, and a tensor for each gradient.
        plain: Whether tensors that a transform or forward mode follows are refused too.
    """
    for g in grads:
        if type(g) not in PLAIN and (plain or not isinstance(g, FakeTensor)):
            return unavailable(f"the fused kernels serve plain tensors, got a {type(g).__name__}")
    for kind in {(g.device, g.dtype): None for g in grads}:
        reason = explain_unavailable(*kind)
        if reason is not None:
            return unavailable(reason)
    for g in grads:
        if g.layout is not torch.strided:
            return unavailable(f"the fused kernels serve dense tensors, got {g.layout}")
        if plain and (is_wrapped(g) or has_tangent(g)):
            return unavailable("a transform follows a gradient")
    for name, role in roles:
        if len(role) != len(grads):
            return ValueError(
                f"fused {rule.name}: expected {len(grads)} tensors in {name}, got {len(role)}."
            )
        for g, x in zip(grads, role):
            if plain and (type(x) not in PLAIN or is_wrapped(x) or has_tangent(x)):
                return unavailable(f"a transform follows a tensor of {name}")
            if g.shape != x.shape or g.dtype != x.dtype or g.device != x.device:
                return ValueError(
                    f"fused {rule.name}: expected {name} of the shape, dtype and device of the "
                    f"gradient, {tuple(g.shape)} {g.dtype} {g.device}; got {tuple(x.shape)} "
                    f"{x.dtype} {x.device}."
                )
    return None


def unavailable(reason: str) -> KernelUnavailableError:
    """Return the error for kernels that were asked for and cannot run."""
    return KernelUnavailableError(
        f"the fused kernel was requested, but {reason}; "
        "use use_accelerated_op=False or backend='reference' for these parameters."
    )


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
    return None if is_traced() or is_watched(value) else as_number(name, value)


def _constants(
    rule: FusedRule, grads: Sequence[Tensor], steps: int | Sequence[Tensor]
) -> tuple[list[Tensor], tuple[int, ...], int]:
    """Return the distinct steps, which of them is that of each gradient, and the step of all."""
    if isinstance(steps, int):
        return [], (), steps
    places: dict[int, int] = {}
    constants: list[Tensor] = []
    order = []
    for g, count in zip(grads, steps, strict=True):
        if id(count) not in places:
            if count.dtype != torch.int64 or count.dim() != 0 or count.device != g.device:
                raise ValueError(
                    f"fused {rule.name}: expected steps as 0-dim int64 tensors on "
                    f"{g.device}, got {tuple(count.shape)} {count.dtype} on {count.device}."
                )
            places[id(count)] = len(constants)
            constants.append(count)
        order.append(places[id(count)])
    return constants, tuple(order), 1


def update(
    rule: FusedRule,
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    params: Sequence[Tensor] | None,
    steps: int | Sequence[Tensor],
    hypers: Mapping[str, Any],
    *,
    maximize: bool = False,
    inplace: bool = False,
    judged: bool = False,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return (updates, states') of one step of an optimizer over all tensors, in one native call.

    The same function as `rule.statement`, with the same conventions at points without a
    derivative, differentiable to any order with respect to gradients, states, parameters and
    hyper-parameters that are tensors. The first derivative is one native call too; it needs the
    inputs, which are all that is kept for it. Higher ones and forward mode are those of the
    statement. Half types are computed in float32.

    Args:
        rule: The rule.
        grads: Gradients.
        states: For each of the rule's states, one tensor for each gradient.
        params: Parameters; read only where there is weight decay, or by the rule.
        steps: The number of this step, from 1: one for all, or a 0-dim int64 tensor for each.
        hypers: A number or a 0-dim tensor for each of `rule.all_hypers`.
        maximize: Go up instead of down.
        inplace: Write the new state into `states`, whose versions are bumped.
        judged: Whether it is known that `refusal` returns None.

    Returns:
        New contiguous tensors; with `inplace`, the tensors of `states` wherever they can be written
        to.

    Raises:
        KernelUnavailableError: No kernel for a dtype, device or layout among `grads`.
        ValueError: Tensors that do not match, or hyper-parameters that are missing or left over.
        AssertionError: Weight decay without `params`.

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
    decayed = rule.reads_params or decays(hypers)
    if decayed and params is None:
        reader = "this transformation" if rule.reads_params else "weight decay"
        raise AssertionError(
            f"Parameters are required for {reader}. "
            "Call `update(updates, state, params=params)` instead."
        )
    read = list(params) if decayed and params is not None else []
    others = [*zip(rule.states, states), *([("params", read)] if decayed else [])]
    refused = None if judged else refusal(rule, grads, others)
    if refused is not None:
        raise refused
    if not grads:
        return [], [[] for _ in states]
    numbers = tuple(_hyper(name, hypers[name]) for name in rule.all_hypers)
    constants, step_of, step = _constants(rule, grads, steps)
    call = FusedCall(rule, len(grads), decayed, maximize, numbers, step_of, step)
    # As they are now: they may be written to before the derivative is taken.
    learned = [hypers[n].clone().reshape(()) for n, h in zip(rule.all_hypers, numbers) if h is None]
    old = [x for role in states for x in role]
    flat = [*grads, *old, *read, *learned, *constants]
    if is_traced() or any(isinstance(x, FakeTensor) for x in flat):
        outputs = call.reference(*flat)  # a compiler fuses the reference implementation itself
    elif learned or any_watched(flat):
        outputs = call.differentiable(flat)
    elif inplace and all(x.is_contiguous() and not x.is_neg() for x in old):
        with torch.no_grad():
            return call.write(flat, states), [list(role) for role in states]
    else:
        with torch.no_grad():
            outputs = call.value(*flat)
    updates, *new = call.roles(outputs, call.num_outputs)
    if inplace:
        new = [list(map(overwrite, *pair)) for pair in zip(states, new)]
    return updates, new


def call_plain(
    rule: FusedRule,
    tensors: list[Tensor],
    size: int,
    step: int | Tensor,
    numbers: Sequence[float],
    *,
    decayed: bool,
    maximize: bool,
    inplace: bool,
) -> list[Tensor] | None:
    """Return updates and new states, one role after the other, in the shortest way.

    None, with nothing done, unless all tensors are plain, on the CPU, and take the same step: then
    the call itself judges them while it reads them. The caller knows that there are kernels and
    that no transform is active.

    Args:
        rule: The rule.
        tensors: Gradients, each role of the state, and the parameters where `decayed`.
        size: The number of gradients.
        step: The number of this step, from 1.
        numbers: A number for each of `rule.all_hypers`.
        decayed: Whether the parameters are among the tensors.
        maximize: Go up instead of down.
        inplace: Write the new state into the old one.
    """
    if in_forward_mode():
        return None
    constants = [step] if isinstance(step, Tensor) else []
    call = FusedCall(
        rule,
        size,
        decayed,
        maximize,
        tuple(numbers),
        (0,) * size if constants else (),
        1 if isinstance(step, Tensor) else step,
    )
    kind = _C.DECAYED_UPDATE if decayed else _C.UPDATE
    found = call.quick(kind, tensors, None, step, record=torch.is_grad_enabled())
    if found is None:
        return None
    outputs, graph = found
    if graph:
        outputs = call.differentiable((*tensors, *constants), outputs)
    outputs = list(outputs)
    if inplace and rule.states:
        last = size * (1 + len(rule.states))
        old = tensors[size:last]
        if graph:
            outputs[size:] = map(overwrite, old, outputs[size:])
        else:
            # Two native calls for all tensors; checking each before one that writes takes longer.
            torch._foreach_copy_(old, outputs[size:])
            outputs[size:] = old
    return outputs
