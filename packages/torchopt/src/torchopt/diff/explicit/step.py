# SPDX-License-Identifier: Apache-2.0
"""The parts of an inner loop: its start, the loss with its gradient, and the update.

Each of the three is a function of tensors. For a batch of tasks each runs under vmap, with the
tasks in the first dimension of parameters and states. The tasks are independent of each other, so
the gradient of the sum of their losses contains the gradient of each.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchopt.base import GradientTransformation
from torchopt.diff.closure import require_arguments, unseen
from torchopt.diff.explicit.call import Call, Hole
from torchopt.diff.explicit.tasks import batched, tasks_in_front
from torchopt.diff.twice_differentiable import (
    OnceDifferentiable,
    TwiceDifferentiable,
    require_second_derivatives,
)
from torchopt.errors import NotDifferentiableError
from torchopt.precision import forget_casts
from torchopt.torch_internals import backward_pass, gradient_in_transform
from torchopt.tree import PyTreeSpec, is_smooth, tree_flatten, tree_unflatten
from torchopt.tree_function import is_transforming
from torchopt.update import apply_updates

__all__ = [
    "Aux",
    "Carry",
    "attached_gradient",
    "gradient_of_sum",
    "losses_of",
    "separate",
    "start",
    "update",
]


CLOSURE = (
    "Pass it after the batch, as in inner_loop(loss, ...)(params, batch, tensor), or detach it."
)


@dataclass(frozen=True)
class Carry:
    """The carry from step to step: the leaves of the parameters and of the optimizer's state."""

    params: tuple[Any, ...]
    state: tuple[Any, ...]
    state_spec: PyTreeSpec

    @functools.cached_property
    def is_full(self) -> bool:
        """Whether every leaf is a tensor."""
        return all(isinstance(x, Tensor) for x in (*self.params, *self.state))

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the leaves."""
        leaves = [*self.params, *self.state]
        return leaves if self.is_full else [x for x in leaves if isinstance(x, Tensor)]

    @functools.cached_property
    def smooth(self) -> list[Tensor]:
        """The floating-point and complex tensors among the leaves."""
        return [x for x in (*self.params, *self.state) if is_smooth(x)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Carry:
        """Return a carry with other tensors."""
        if self.is_full:
            count = len(self.params)
            full = Carry(tuple(tensors[:count]), tuple(tensors[count:]), self.state_spec)
            full.__dict__["is_full"] = True
            return full
        remaining = iter(tensors)
        params, state = (
            tuple(next(remaining) if isinstance(x, Tensor) else x for x in leaves)
            for leaves in (self.params, self.state)
        )
        return Carry(params, state, self.state_spec)

    def with_smooth(self, tensors: Sequence[Tensor]) -> Carry:
        """Return a carry with other smooth tensors."""
        remaining = iter(tensors)
        params, state = (
            tuple(next(remaining) if is_smooth(x) else x for x in leaves)
            for leaves in (self.params, self.state)
        )
        return Carry(params, state, self.state_spec)

    def detached(self) -> Carry:
        """Return the carry outside any graph.

        A tensor that occurs several times stays one tensor: leaves that share a count are updated
        in one call.
        """
        made = {id(x): x.detach() for x in self.tensors()}
        return self.with_tensors([made[id(x)] for x in self.tensors()])


@dataclass(frozen=True)
class Aux:
    """The aux of a loss: everything that it returned besides its value."""

    leaves: tuple[Any, ...]
    spec: PyTreeSpec

    @functools.cached_property
    def smooth(self) -> list[Tensor]:
        """The floating-point and complex tensors among the leaves."""
        return [x for x in self.leaves if is_smooth(x)]


def losses_of(
    call: Call, params: Sequence[Any], tensors: Sequence[Any], step: int
) -> tuple[Tensor, Aux]:
    """Return the loss of a step, 0-dim or `[tasks]`, and its aux.

    Args:
        call: The call.
        params: The leaves of the parameters.
        tensors: Tensors for the inputs of the call.
        step: The step, counted from 0.
    """
    trees = (call.batch(step), *call.meta)

    def evaluated(*arguments: Any) -> tuple[Tensor, Any]:
        is_watched = not call.plain and (call.second_order or is_transforming())
        watch = TwiceDifferentiable if call.second_order else OnceDifferentiable
        with watch() if is_watched else contextlib.nullcontext():
            found = _value_and_aux(call.loss(*arguments))
        forget_casts()  # the next step has other parameters
        return found

    if call.tasks is None:
        value, aux = evaluated(
            tree_unflatten(call.params.spec, params), *(x.fill(tensors, step) for x in trees)
        )
        return value, Aux(*_flat(aux))

    def of_leaves(leaves: Sequence[Any]) -> tuple[Tensor, Any]:
        remaining = iter(leaves)
        return evaluated(
            *(
                tree_unflatten(tree.spec, list(itertools.islice(remaining, len(tree.leaves))))
                for tree in (call.params, *trees)
            )
        )

    leaves = [*params]
    dims: list[Any] = [0] * len(params)
    for tree in trees:
        leaves += tree.filled(tensors, step)
        dims += [call.dims[x.index] if isinstance(x, Hole) else None for x in tree.leaves]
    value, aux = batched(of_leaves, leaves, dims)
    return value, Aux(*_flat(aux))


def _flat(tree: Any) -> tuple[tuple[Any, ...], PyTreeSpec]:
    leaves, spec = tree_flatten(tree, none_is_leaf=True)
    return tuple(leaves), spec


def _value_and_aux(found: Any) -> tuple[Tensor, Any]:
    aux = None
    if isinstance(found, tuple) and len(found) == 2:
        found, aux = found
    if not isinstance(found, Tensor) or found.ndim != 0 or not found.is_floating_point():
        got = (
            f"{found.dtype} of shape {tuple(found.shape)}"
            if isinstance(found, Tensor)
            else type(found).__name__
        )
        raise TypeError(
            "inner_loop: loss: expected a 0-dim floating-point tensor, or such a tensor and "
            f"something else, got {got}; reduce it, with .mean() or .sum()."
        )
    return found, aux


def attached_gradient(
    call: Call, params: Sequence[Any], tensors: Sequence[Any], step: int
) -> tuple[list[Any], Tensor, Aux]:
    """Return the gradient of the loss, the loss and its aux, differentiable to any order.

    The gradient is None for leaves that the loss does not depend on.
    """
    where = [i for i, x in enumerate(params) if is_smooth(x)]

    def evaluated(at: Sequence[Tensor]) -> tuple[Tensor, Aux]:
        filled = list(params)
        for i, x in zip(where, at):
            filled[i] = x
        return losses_of(call, filled, tensors, step)

    at = [params[i] for i in where]
    with torch.enable_grad():
        if is_transforming():
            form: list[PyTreeSpec] = []

            def flat(inner: Sequence[Tensor]) -> tuple[Tensor, Sequence[Any]]:
                value, aux = evaluated(inner)
                require_curvature(call, value, inner, tensors)
                form[:] = [aux.spec]
                return value.sum(), (value, *aux.leaves)

            found, (value, *leaves) = gradient_in_transform(flat, at)
            aux = Aux(tuple(leaves), form[0])
        else:
            at = [x if x.requires_grad else x + _zeros(x) for x in at]
            value, aux = evaluated(at)
            require_graph(value)
            if step == 0:  # the graph of a later step contains the earlier steps as well
                require_no_closure(call, [value, *aux.smooth], at, tensors)
            require_curvature(call, value, at, tensors)
            found = list(
                gradient_of_sum(value, at, create_graph=call.second_order, retain_graph=True)
            )
    if not call.second_order:
        found = [None if g is None else g.detach() for g in found]
    return scattered(params, where, found), value, aux


def gradient_of_sum(
    value: Tensor, at: Sequence[Tensor], *, create_graph: bool, retain_graph: bool
) -> Sequence[Tensor | None]:
    """Return the gradient of the sum of a loss over the tasks."""
    return backward_pass(
        value if value.ndim == 0 else value.sum(),
        at,
        retain_graph=retain_graph,
        create_graph=create_graph,
    )


def _zeros(x: Tensor) -> Tensor:
    # Adding zeros keeps the tangents of forward mode, which `detach` would drop.
    return unseen(torch.zeros_like(x.detach()).requires_grad_())


def require_no_closure(call: Call, value: Any, params: Any, tensors: Sequence[Any]) -> None:
    """Raise if the loss or its aux depends on a tensor that is differentiated but no argument."""
    if call.plain:
        return
    require_arguments(value, (params, list(tensors)), call.loss, "inner_loop: loss", CLOSURE)


def require_curvature(
    call: Call, value: Tensor, at: Sequence[Tensor], tensors: Sequence[Any]
) -> None:
    """Raise if torch would silently return zero for second derivatives of the loss."""
    if call.second_order and not call.plain:
        others = [x for x in tensors if isinstance(x, Tensor)]
        require_second_derivatives([value], at, "inner_loop: loss", others)


def require_graph(value: Tensor) -> None:
    """Raise unless the loss depends on something."""
    if not value.requires_grad and torch.is_inference_mode_enabled():
        raise NotDifferentiableError(
            "inner_loop: expected a call outside of torch.inference_mode(), in which no gradient "
            "can be computed, not even that of an inner step, got one inside; use torch.no_grad()."
        )
    if not value.requires_grad:
        raise NotDifferentiableError(
            "inner_loop: the loss does not depend on the parameters: expected a loss computed from "
            "its first argument, got one without a graph; call the module with "
            "torchopt.params.functional_call(module, params, batch), and detach nothing."
        )


def scattered(params: Sequence[Any], where: Sequence[int], found: Sequence[Any]) -> list[Any]:
    """Return a list like the parameters with gradients at the positions `where`, else None."""
    if all(g is None for g in found):
        raise NotDifferentiableError(
            "inner_loop: the loss does not depend on any of the parameters; expected a loss "
            "computed from its first argument."
        )
    out: list[Any] = [None] * len(params)
    for i, g in zip(where, found):
        out[i] = g
    return out


def update(
    call: Call, optimizer: GradientTransformation, grads: Sequence[Any], carry: Carry
) -> Carry:
    """Return parameters and state after the update of the optimizer."""
    count = len(carry.params)

    def stepped(leaves: Sequence[Any]) -> Any:
        params = tree_unflatten(call.params.spec, leaves[:count])
        found = tree_unflatten(call.params.spec, leaves[count : 2 * count])
        state = tree_unflatten(carry.state_spec, leaves[2 * count :])
        updates, state = optimizer.update(found, state, params=params, inplace=False)
        return apply_updates(params, updates, inplace=False), state

    leaves = [*carry.params, *grads, *carry.state]
    if call.tasks is None:
        return _carry(*stepped(leaves))
    # In a traced run, counts are 0-dim tensors instead of Python integers; tasks share them.
    shared = [isinstance(x, Tensor) and x.ndim == 0 for x in leaves]
    after = _carry(*batched(stepped, leaves, [None if alike else 0 for alike in shared]))
    state = zip(after.state, shared[2 * count :])
    return replace(after, state=tuple(x[0] if alike else x for x, alike in state))


def _carry(params: Any, state: Any) -> Carry:
    return Carry(_flat(params)[0], *_flat(state))


def separate(x: Tensor) -> Tensor:
    """Return a tensor whose elements do not share memory, which dual numbers require."""
    overlapping = any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape))
    return x.contiguous() if overlapping else x


def _for_each(x: Tensor, tasks: int) -> Tensor:
    return separate(x.expand(tasks)) if x.ndim == 0 else x


def start(call: Call, optimizer: GradientTransformation, tensors: Sequence[Any]) -> Carry:
    """Return the carry at the start; the tasks are the first dimension of each tensor."""
    params = call.params.filled(tensors)
    if call.tasks is not None:
        dims = [call.dims[x.index] if hasattr(x, "index") else None for x in call.params.leaves]
        params = tasks_in_front(params, dims, call.tasks)
    # Aliases, since one tensor may be two parameters, or a parameter and an argument of the loss.
    params = [separate(x.view_as(x)) if isinstance(x, Tensor) else x for x in params]
    if call.state is not None:
        state = call.state.filled(tensors)
        if call.tasks is not None:  # tasks share a 0-dim entry at the start, but not later
            state = [_for_each(x, call.tasks) if is_smooth(x) else x for x in state]
        return Carry(tuple(params), tuple(state), call.state.spec)

    def made(leaves: Sequence[Any]) -> Any:
        return optimizer.init(tree_unflatten(call.params.spec, leaves))

    state = made(params) if call.tasks is None else batched(made, params, [0] * len(params))
    return Carry(tuple(params), *_flat(state))
