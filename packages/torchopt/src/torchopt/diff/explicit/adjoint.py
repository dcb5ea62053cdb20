# SPDX-License-Identifier: Apache-2.0
r"""The adjoint of one step.

A step is s' = \Phi(s, g, h) with g = \nabla L(\theta, \eta). Here s are the parameters \theta and
the state, h the tensors of the optimizer, and \eta all other inputs of the loss. For a cotangent
\lambda of s',

1. the vector-Jacobian product of \Phi gives \lambda_s, \lambda_g and \lambda_h;
2. one product with the second derivatives of L in the direction \lambda_g is added:

   (\nabla^2_{\theta\theta} L \lambda_g, \nabla^2_{\eta\theta} L \lambda_g).

The second part is computed by reverse over reverse mode (`"reverse"`), by forward over reverse
mode, which needs the memory of a first derivative (`"mixed"`), or from differences of gradients
(`"differences"`); `"first_order"` leaves it out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.base import GradientTransformation
from torchopt.diff.differences import Product
from torchopt.diff.explicit.blocks import rematerialised
from torchopt.diff.explicit.call import Call
from torchopt.diff.explicit.dual import (
    Slope,
    dual_gradient,
    forward_mode_explained,
    tangent_of,
)
from torchopt.diff.explicit.moments import Moment
from torchopt.diff.explicit.step import (
    Aux,
    Carry,
    gradient_of_sum,
    losses_of,
    require_curvature,
    require_graph,
    require_no_closure,
    scattered,
    start,
    update,
)
from torchopt.diff.explicit.variables import Input, Leaves, Variables
from torchopt.torch_internals import any_autocast, forward_mode, pull_back
from torchopt.tree import is_smooth

__all__ = [
    "Cotangents",
    "attached_step",
    "gradient",
    "pull_back_start",
    "pull_back_steps",
    "pulled",
    "unit_cotangents",
]

Replayed = Callable[[], AbstractContextManager[None]]


@dataclass
class Cotangents:
    """Cotangents of the results of steps; None stands for zero.

    Attributes:
        carry: One for each smooth tensor of the parameters, then of the state, after the steps.
        losses: For each step, one for its loss and one for each smooth tensor of its aux.
    """

    carry: list[Tensor | None]
    losses: list[list[Tensor | None]]


def unit_cotangents(after: Carry, value: Tensor, aux: Aux) -> Cotangents:
    """Return ones as the cotangents of everything that a step returns."""
    of_losses = [torch.ones_like(x) for x in (value, *aux.smooth)]
    return Cotangents([torch.ones_like(x) for x in after.smooth], [[*of_losses]])


def gradient(
    call: Call, carry: Carry, tensors: Sequence[Any], step: int
) -> tuple[list[Any], Tensor, Aux]:
    """Return the gradient of the loss, the loss and its aux, outside any graph.

    Raises:
        NotDifferentiableError: The loss depends on a tensor that requires a gradient and is not
            an argument.
    """
    where = [i for i, x in enumerate(carry.params) if is_smooth(x)]
    params = list(carry.params)
    with torch.enable_grad():
        at = [params[i].detach().requires_grad_() for i in where]
        for i, x in zip(where, at):
            params[i] = x
        with _rematerialised(call):
            value, aux = losses_of(call, params, tensors, step)
        require_graph(value)
        require_no_closure(call, [value, *aux.smooth], at, tensors)
        require_curvature(call, value, at, tensors)
        found = gradient_of_sum(value, at, create_graph=False, retain_graph=False)
    leaves = tuple(x.detach() if isinstance(x, Tensor) else x for x in aux.leaves)
    return scattered(params, where, found), value.detach(), Aux(leaves, aux.spec)


def _rematerialised(call: Call) -> AbstractContextManager[None]:
    return rematerialised(call.blocks, call.compiled_blocks, call.known_blocks)


def pulled(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the vector-Jacobian product, skipping zeros and outputs without a graph."""
    both = zip(outputs, cotangents, strict=True)
    pairs = [(y, c) for y, c in both if c is not None and y.requires_grad]
    if not pairs or not inputs:
        return [None] * len(inputs)
    ys, cs = [y for y, _ in pairs], [c for _, c in pairs]
    if not any_autocast():
        return list(pull_back(ys, inputs, cs))
    with contextlib.ExitStack() as stack:  # a backward pass belongs outside autocast
        for device in {y.device.type for y in ys}:
            stack.enter_context(torch.autocast(device, enabled=False))
        return list(pull_back(ys, inputs, cs))


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def pull_back_steps(
    call: Call,
    moment: Moment,
    inputs: Leaves,
    steps: range,
    cotangents: Cotangents,
    replayed: Replayed,
) -> tuple[list[Tensor | None], dict[Input, Tensor]]:
    """Return the cotangents of the smooth tensors of the carry and those of the inputs.

    Args:
        call: The call.
        moment: The one before the steps. It is emptied. Its gradient is that of the only step.
        inputs: The inputs.
        steps: The steps, counted from 0; more than one only in reverse mode.
        cotangents: The cotangents of the results of the steps. Modes other than reverse clear
            those of the carry.
        replayed: A context in which the loss finds the surroundings of the first of these steps.
    """
    carry, grads = moment.taken()
    variables = Variables.of(call, carry, inputs, steps)
    # The optimizer may draw random numbers after the loss, hence in the same context. If it does,
    # no gradient is kept. In reverse mode the loss is evaluated again, here.
    alone = call.derivative != "reverse" and grads is not None and moment.seen is not None
    with moment.seen.replayed_beside() if alone else replayed(), torch.enable_grad():
        optimizer = inputs.optimizer_now()
        if call.derivative == "reverse":
            out = _reverse(call, variables, optimizer, steps, grads, cotangents)
            return variables.parted(out)
        if grads is None:
            grads, _, _ = gradient(call, carry, inputs.constants, steps[0])
        directions, out = _of_update(call, variables, optimizer, grads, cotangents)
    # With a trail, the result is compared with that of another engine.
    judged = call.derivative == "mixed" and call.trail is None
    slope = Slope.of(grads, directions) if judged else None
    center = [g for g, x in zip(grads, carry.params) if is_smooth(x)] if call.judge else []
    # Free what the loss does not need, about five times the size of the parameters.
    del carry, grads
    cotangents.carry.clear()
    left = variables.drop_state()

    def add(more: Sequence[Tensor | None]) -> None:
        for i, x in zip(left, more):
            out[i] = _added(out[i], x)

    for more in _of_loss(call, variables, steps[0], slope, directions, cotangents, replayed):
        add(more)
    if call.judge is not None and any(d is not None for d in directions):
        product = _differences(call, variables, steps[0], directions, center, replayed)
        add(product.value)
        both = zip(left, product.value)
        call.judge.note(product, [out[i] for i, y in both if y is not None])
    return variables.parted(out)


def attached_step(
    call: Call,
    optimizer: GradientTransformation,
    tensors: Sequence[Any],
    carry: Carry,
    step: int,
) -> tuple[Carry, list[Any], Tensor, Aux]:
    """Return the state after a step, the gradient, the loss and its aux, all with their graph."""
    grads, value, aux = _attached_gradient(call, tensors, carry, step)
    return update(call, optimizer, grads, carry), grads, value, aux


def _attached_gradient(
    call: Call, tensors: Sequence[Any], carry: Carry, step: int
) -> tuple[list[Any], Tensor, Aux]:
    where = [i for i, x in enumerate(carry.params) if is_smooth(x)]
    value, aux = losses_of(call, carry.params, tensors, step)
    require_graph(value)
    at = [carry.params[i] for i in where]
    found = gradient_of_sum(value, at, create_graph=True, retain_graph=True)
    return scattered(carry.params, where, found), value, aux


def _reverse(
    call: Call,
    variables: Variables,
    optimizer: GradientTransformation,
    steps: range,
    kept: Sequence[Any] | None,
    cotangents: Cotangents,
) -> list[Tensor | None]:
    """Return the cotangents of state and inputs by reverse over reverse mode."""
    carry = variables.carry
    outputs: list[Tensor] = []
    for step in steps:
        if kept is None:
            carry, _, value, aux = attached_step(call, optimizer, variables.tensors, carry, step)
        else:
            grads, value, aux = _attached_gradient(call, variables.tensors, carry, step)
        outputs += [value, *aux.smooth]
    given = [c for row in cotangents.losses for c in row]
    if kept is None:  # one pass over the graph of whole steps
        outputs += carry.smooth
        return pulled(outputs, [*given, *cotangents.carry], variables.leaves)
    # A traced program then omits the operations that only the value of the gradient needs.
    directions, out = _of_update(call, variables, optimizer, kept, cotangents)
    pairs = [(g, d) for g, d in zip(grads, directions) if g is not None]
    outputs += [g for g, _ in pairs]
    more = pulled(outputs, [*given, *(d for _, d in pairs)], variables.leaves)
    return [_added(x, y) for x, y in zip(out, more)]


def _of_update(
    call: Call,
    variables: Variables,
    optimizer: GradientTransformation,
    grads: Sequence[Any],
    cotangents: Cotangents,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Return the cotangents of the gradient, and of state and inputs through the update."""
    leaves = [None if g is None else g.detach().requires_grad_() for g in grads]
    after = update(call, optimizer, leaves, variables.carry)
    present = [g for g in leaves if g is not None]
    found = pulled(after.smooth, cotangents.carry, [*present, *variables.leaves])
    of_grads = iter(found[: len(present)])
    return [None if g is None else next(of_grads) for g in leaves], found[len(present) :]


def _of_loss(
    call: Call,
    variables: Variables,
    step: int,
    slope: Slope | None,
    directions: Sequence[Tensor | None],
    cotangents: Cotangents,
    replayed: Replayed,
) -> Iterator[list[Tensor | None]]:
    """Yield the contributions that flow through the loss, each a list of cotangents."""
    if any(c is not None for c in cotangents.losses[0]):
        with replayed(), torch.enable_grad(), _rematerialised(call):
            value, aux = losses_of(call, variables.carry.params, variables.tensors, step)
        yield pulled([value, *aux.smooth], cotangents.losses[0], variables.leaves)
        del value, aux
    if call.derivative == "mixed" and any(d is not None for d in directions):
        with replayed():
            found = _mixed(call, variables, step, slope, directions)
        yield found


def _mixed(
    call: Call,
    variables: Variables,
    step: int,
    slope: Slope | None,
    directions: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return d/de of the gradient of L(theta + e * direction, ...) at e = 0."""
    with torch.enable_grad(), forward_mode(), forward_mode_explained():
        params = [
            x if d is None else forward_ad.make_dual(x, d)
            for x, d in zip(variables.carry.params, directions)
        ]
        with _rematerialised(call):
            value, _ = losses_of(call, params, variables.tensors, step)
        found = [tangent_of(g) for g in dual_gradient([value.sum()], variables.leaves, dense=True)]
        if slope is not None:
            slope.require(value, variables.leaves[: sum(map(is_smooth, params))], found)
        return found


def _differences(
    call: Call,
    variables: Variables,
    step: int,
    directions: Sequence[Tensor | None],
    center: Sequence[Tensor | None],
    replayed: Replayed,
) -> Product:
    """Return the same derivative from differences of gradients, and its error."""

    def gradient(params: list[Any], weight: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        with replayed(), torch.enable_grad():
            value, _ = losses_of(call, params, variables.tensors, step)
            weighted = (value * weight.to(value.dtype)).sum()
            found = torch.autograd.grad(weighted, variables.leaves, allow_unused=True)
            return weighted, found

    assert call.judge is not None
    return call.judge.differences.product(
        gradient, variables.carry.params, directions, center, call.tasks
    )


def pull_back_start(
    call: Call, inputs: Leaves, cotangents: Sequence[Tensor | None]
) -> dict[Input, Tensor]:
    """Return the cotangents of the inputs that flow through the start of the run.

    Args:
        call: The call.
        inputs: The inputs.
        cotangents: The cotangents of the smooth tensors of the carry at the start.
    """
    leaves = list(inputs.tensors)
    # A state that is given does not depend on the optimizer.
    apart = call.state is not None
    where = [i for i in call.wanted if not call.by_step(i) and not (apart and i in call.hypers)]
    with torch.enable_grad():
        first = start(call, call.optimizer if apart else inputs.optimizer, leaves)
        found = pulled(first.smooth, cotangents, [leaves[i] for i in where])
    return {(i, None): c for i, c in zip(where, found) if c is not None}
