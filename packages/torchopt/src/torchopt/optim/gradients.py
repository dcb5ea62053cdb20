# SPDX-License-Identifier: Apache-2.0
"""Gradients of a loss with respect to a list of tensors, with messages for common mistakes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchopt.errors import NotDifferentiableError, SecondDerivativeWarning
from torchopt.params.lineage import begin_step
from torchopt.params.second_order import explain_no_derivative
from torchopt.torch_internals import backward_pass, correct_second_derivatives, is_wrapped

__all__ = ["gradients", "no_attribute"]


def no_attribute(optimizer: object, name: str) -> NoReturn:
    """Raise AttributeError for an optimizer whose `step` takes the loss."""
    text = f"{type(optimizer).__name__!r} object has no attribute {name!r}"
    if name == "zero_grad":
        text += (
            "; step(loss) computes the gradient itself and leaves no .grad behind: leave out "
            "zero_grad() and backward()"
        )
    elif name == "param_groups":
        text += "; to change a hyper-parameter later, pass a tensor or a schedule for it"
    raise AttributeError(text, name=name, obj=optimizer)


def gradients(
    loss: Tensor,
    params: Sequence[Tensor],
    names: Sequence[str],
    *,
    create_graph: bool = True,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """Return d loss / d params; None for parameters that are frozen or that the loss does not use.

    Args:
        loss: 0-dim tensor with a graph.
        params: Tensors; those without `requires_grad` are left out.
        names: The names of the parameters in messages.
        create_graph: Make the gradients differentiable.
        retain_graph: Keep the graph of `loss`; None means the value of `create_graph`.

    Raises:
        TypeError: `loss` is not a tensor.
        ValueError: `loss` is not a scalar.
        NotDifferentiableError: `loss` has no graph, no parameter requires a gradient, `loss`
            depends on none of the parameters, or an operation has no second derivative.
    """
    if not isinstance(loss, Tensor):
        is_number = hasattr(loss, "__float__")
        advice = "pass the loss itself, not loss.item()" if is_number else "pass the loss first"
        raise TypeError(f"step(loss): expected a 0-dim tensor, got {type(loss).__name__}; {advice}")
    if loss.numel() != 1:
        raise ValueError(
            f"step(loss): expected a scalar loss, got a tensor of shape {tuple(loss.shape)}; "
            "reduce it with mean() or sum()."
        )
    if not loss.requires_grad and is_wrapped(loss):
        raise NotDifferentiableError(
            "step(loss): the loss is computed under torch.func.vmap or another transform, which "
            "hides its graph from the step; use torchopt.inner_loop, or torch.func.grad with "
            "torchopt.sgd and the like; in TaskParallel, use tasks_at_once=1."
        )
    used: Sequence[Tensor] = [p for p in params if p.requires_grad]
    if not used:
        raise NotDifferentiableError(
            f"step(loss): none of the {len(params)} parameters requires a gradient; "
            "call requires_grad_() on those to be stepped, before the loss is computed."
        )
    if not loss.requires_grad:
        advice = "compute it from them, outside of torch.no_grad(), not from detached copies"
        if not torch.is_grad_enabled():
            advice = (
                "compute it under torch.enable_grad(): gradients are off here, by torch.no_grad() "
                "or because a solver of torchopt.diff.implicit runs without a graph"
            )
        raise NotDifferentiableError(
            "step(loss): the loss has no graph, so it has no gradient with respect to the "
            f"parameters; {advice}"
        )
    frozen = len(used) < len(params)
    if frozen:
        names = [name for name, p in zip(names, params) if p.requires_grad]
    if create_graph:
        _look_at_second_derivatives(correct_second_derivatives([loss], used))
    handles = begin_step(used, names)
    retain_graph = create_graph if retain_graph is None else retain_graph
    try:
        found: Sequence[Any] = backward_pass(
            loss, used, retain_graph=retain_graph, create_graph=create_graph
        )
    except RuntimeError as error:
        explained = explain_no_derivative("step(loss)", error)
        if explained is None and "backward through the graph a second time" in str(error):
            explained = NotDifferentiableError(
                "step(loss): expected a loss with its graph, got one whose graph was freed by "
                "loss.backward() or an earlier step; step computes the gradient itself, so leave "
                "out backward(), and compute the loss again for each step."
            )
        if explained is None:
            raise
        raise explained from error
    finally:
        for handle in handles:
            handle.remove()
    if all(g is None for g in found):
        raise NotDifferentiableError(
            f"step(loss): the loss does not depend on any of the parameters "
            f"({', '.join(names[:4])}{', ...' if len(used) > 4 else ''}); was it computed before "
            "the last step, or from a copy?"
        )
    if not frozen:
        return list(found)
    rest = iter(found)
    return [next(rest) if p.requires_grad else None for p in params]


def _look_at_second_derivatives(wrong: Sequence[tuple[str, bool]]) -> None:
    for name, is_refused in wrong:
        if is_refused:
            raise NotDifferentiableError(
                f"step(loss): expected operations that can be differentiated twice, got {name}, "
                "whose second derivative is zero in torch; pass options=None, or "
                "first_order=True"
            )
        warnings.warn(
            f"step(loss): the loss has an operation without a second derivative ({name}); "
            "torch returns zero for it, so a meta-gradient through this step lacks a term; write "
            "its backward in differentiable operations, or step with first_order=True",
            SecondDerivativeWarning,
            stacklevel=5,
        )
