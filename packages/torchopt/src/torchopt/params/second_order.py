# SPDX-License-Identifier: Apache-2.0
"""Check whether a loss can be differentiated twice, and suggest remedies if it cannot."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from torchopt.errors import NotDifferentiableError, SecondDerivativeWarning
from torchopt.params.doctor import Disagreement, Line, SecondDerivatives, is_varied
from torchopt.params.lineage import graph_nodes
from torchopt.params.recording import NotJudgedError
from torchopt.torch_internals import forward_mode
from torchopt.tree import tree_flatten, tree_unflatten

__all__ = [
    "SecondDerivatives",
    "check_second_order",
    "explain_no_derivative",
    "warn_of_missing_second_derivatives",
]

# (a pattern in torch's message, the remedy)
REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"scaled_dot_product|ScaledDotProduct|_flash_attention|_efficient_attention",
        "run the model under torch.nn.attention.sdpa_kernel("
        "torch.nn.attention.SDPBackend.MATH), whose kernel is made of differentiable operations; "
        "torchopt.inner_loop replaces it by itself",
    ),
    (
        r"mkldnn_rnn|MkldnnRnn",
        "run the model under torch.backends.mkldnn.flags(enabled=False); torchopt.inner_loop does "
        "so by itself",
    ),
    (
        r"cudnn|CudnnRnn",
        "run the model under torch.backends.cudnn.flags(enabled=False); torchopt.inner_loop does "
        "so by itself",
    ),
    (
        r"_thnn_fused|_fused_",
        "use the operation's unfused form",
    ),
    (
        r"once_differentiable|differentiate twice",
        "write the backward of the autograd.Function in differentiable operations and drop "
        "@once_differentiable",
    ),
    (r"use_reentrant", "call torch.utils.checkpoint with use_reentrant=False"),
    (r"hardsigmoid", "write relu6(x + 3) / 6"),
    (r"embedding_bag", "use an nn.Embedding, and the sum or the mean of its rows"),
    (r"_[cp]dist", "write the distances out: (x[:, None] - y).norm(dim=-1)"),
    (
        r"ZeroTensors are immutable",
        "write the loss in elementary operations, such as (x - y).square().mean() for mse_loss, as "
        "torchopt.inner_loop does by itself",
    ),
    (r"weight_norm|WeightNorm", "write the normalisation out: g * v / v.norm(...)"),
    (r"_foreach_", "use the operation on one tensor at a time"),
    (
        r"setup_context|generate_vmap_rule|jvp",
        "give the autograd.Function setup_context and jvp static methods",
    ),
)

# Graph nodes that raise when they are reached.
_DELAYED = ("Error", "DelayedError")

_OPERATION = re.compile(
    r"derivative for (?:'|`)?([\w:.]+)|Trying to use forward AD with ([\w:.]+)|"
    r"([A-Za-z_]\w*Backward\d*)"
)


def _named(error: Exception) -> tuple[str, str | None, str]:
    """Return the operation that torch refuses, a remedy if one is known, and torch's message."""
    text = str(error)
    found = _OPERATION.search(text)
    operation = next((g for g in found.groups() if g), None) if found else None
    remedy = next((r for pattern, r in REMEDIES if re.search(pattern, text)), None)
    said = text.splitlines()[0] if text else type(error).__name__
    return operation or "an operation", remedy, said


def _missing(error: Exception) -> NotDifferentiableError:
    operation, remedy, said = _named(error)
    remedy = remedy or (
        'write it in other operations, or use an inner loop with derivative="differences", which '
        "needs first derivatives only"
    )
    return NotDifferentiableError(
        "check_second_order: the loss cannot be differentiated twice (reverse over reverse mode): "
        f"{operation} has no second derivative. Remedy: {remedy}. torch says: {said}"
    )


def _warn_of_mode(error: Exception) -> None:
    operation, remedy, said = _named(error)
    warnings.warn(
        "check_second_order: the second derivative exists, but torch refuses to compute it in "
        f"forward over reverse mode, because of {operation}. Nothing is wrong in reverse over "
        f"reverse mode. Remedy, if you need the other one: {remedy or 'use another operation'}. "
        f"torch says: {said}",
        SecondDerivativeWarning,
        stacklevel=4,
    )


def explain_no_derivative(
    what: str, error: Exception, otherwise: str = "first_order=True"
) -> NotDifferentiableError | None:
    """Return the error to raise if torch reports an operation without a derivative.

    Args:
        what: The call in which it occurred, with which the message starts.
        error: Torch's exception.
        otherwise: Another remedy, if none is known for the operation.

    Returns:
        The error; None if `error` has another cause.
    """
    text = str(error)
    found = re.search(r"derivative for '?([\w:.]+)'? is not implemented", text)
    if found is None:
        return None
    remedy = next((r for pattern, r in REMEDIES if re.search(pattern, text)), None)
    return NotDifferentiableError(
        f"{what}: expected operations that can be differentiated twice, got one without a second "
        f"derivative ({found[1]}); {remedy or f'use another form of it, or {otherwise}'}"
    )


# Keyed by identity, because a module may define __eq__.
_warned: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def warn_of_missing_second_derivatives(
    module: nn.Module, grads: Sequence[Tensor | None], what: str
) -> None:
    """Warn, once for each module, about gradients that cannot be differentiated.

    Args:
        module: The module whose parameters have these gradients.
        grads: Gradients with a graph.
        what: The call with which the message starts.
    """
    if _warned.get(id(module)) is module:
        return
    _warned[id(module)] = module
    names = [str(node.name()) for node in graph_nodes([g for g in grads if g is not None])]
    if not any(name.rpartition("::")[2] in (*_DELAYED, "NotImplemented") for name in names):
        return
    remedy = next((r for pattern, r in REMEDIES if re.search(pattern, " ".join(names))), None)
    warnings.warn(
        f"{what}: the model has an operation without a second derivative, so that a meta-gradient "
        "through this step raises or lacks a term; "
        f"{remedy or 'torchopt.params.check_second_order(loss, params) names it'}; or step with "
        "first_order=True",
        SecondDerivativeWarning,
        stacklevel=3,
    )


def _is_error(node: Any) -> bool:
    # The node that @once_differentiable leaves in the graph. It has no edge to the inputs, so
    # torch.autograd.grad never runs it, and the second derivative is silently zero.
    return str(node.name()).rpartition("::")[2] in _DELAYED


def _reverse_over_reverse(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    # The cotangent requires a gradient. Otherwise a function whose backward leaves the graph
    # (@once_differentiable) would look like a linear one.
    cotangent = torch.ones_like(loss, requires_grad=True)
    grads = torch.autograd.grad(loss, leaves, cotangent, create_graph=True, allow_unused=True)
    used = [g for g in grads if g is not None]
    if not used:
        raise NotDifferentiableError(
            "check_second_order: the loss does not depend on any of the parameters"
        )
    curved = [g for g in used if g.requires_grad]
    if any(_is_error(node) for node in graph_nodes(curved)):
        raise RuntimeError(
            "trying to differentiate twice a function that was marked with @once_differentiable"
        )
    if curved:
        torch.autograd.grad(
            curved,
            leaves,
            grad_outputs=[torch.ones_like(g) for g in curved],
            allow_unused=True,
            retain_graph=True,
        )


def _judge(loss: Callable[[Any], Tensor], params: Any) -> Line | None:
    try:
        line = Line(loss, params)
        _refuse(line.disagreement(), "reverse over reverse mode")
    except NotJudgedError as reason:
        _warn_of_values(reason)
        return None
    return line


def _warn_of_values(reason: NotJudgedError) -> None:
    warnings.warn(
        f"check_second_order: the derivatives exist; their values were not checked: {reason}",
        SecondDerivativeWarning,
        stacklevel=4,
    )


def _refuse(wrong: Disagreement | None, mode: str) -> None:
    if wrong is None:
        return
    if wrong.checkpointed:
        remedy = (
            "the backward pass recomputes activations with other weights; call the module with "
            "torchopt.params.functional_call"
        )
    else:
        found = (r for pattern, r in REMEDIES if re.search(pattern, wrong.operation))
        remedy = next(found, "write it in other operations, or correct its backward")
    raise NotDifferentiableError(
        f"check_second_order: expected the {wrong.order} derivative of {wrong.operation} to "
        f"agree with differences ({wrong.difference:.6g} along a random direction), got "
        f"{wrong.derivative:.6g} in {mode}. Remedy: {remedy}"
    )


def check_second_order(
    loss: Tensor | Callable[[Any], Tensor], params: Any, *, forward: bool = True
) -> SecondDerivatives | None:
    """Raise unless the loss has correct second derivatives with respect to the parameters.

    A meta-gradient differentiates the gradient of the inner loss once more. Some fast kernels,
    such as those of attention and recurrent layers, have no second derivative, and some operations
    have a wrong one. This function names the operation and a remedy before you write an inner loop.

    If `loss` is a function, the values are checked as well. The product u · H v with the Hessian H
    and seeded random u and v is computed by reverse over reverse mode, by forward over reverse mode
    and by central differences of the gradient. All run in float64, at a point a hundredth of the
    parameters' size away from them. If the results disagree, every intermediate value and gradient
    is compared in the order of computation, and the first that disagrees identifies the operation.
    Values cut off by `detach` or `no_grad` count as constants.

    Args:
        loss: A 0-dim tensor with a graph, or a function of the parameters that returns one. For a
            tensor, only the existence of the derivative in reverse over reverse mode is checked.
        params: A tree of tensors; those that do not require a gradient are constants.
        forward: Whether to check forward over reverse mode too, if `loss` is a function. It is the
            mode of an inner loop with `derivative="mixed"`.

    Returns:
        For a function, the product u · H v from each of the ways; the one from forward mode is None
        if torch refuses that. None for a tensor, and if the values could not be checked.

    Raises:
        NotDifferentiableError: There is no second derivative, or it is wrong in one of the modes;
            the message names the operation, the mode, and the remedy. Or the loss has no graph, or
            depends on none of the parameters.
        TypeError: `loss` is neither a tensor nor a function.

    Warns:
        SecondDerivativeWarning: The derivatives exist, but their values cannot be checked: the loss
            does not run in float64, returns another value at each call, or is not finite. Or torch
            refuses forward over reverse mode, where nothing can be wrong, as an error is raised.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> found = check_second_order(lambda p: (p["w"] ** 3).sum(), {"w": w})
        >>> abs(found.reverse - found.difference) < 1e-6 * abs(found.reverse)
        True
    """
    leaves, spec = tree_flatten(params)
    if isinstance(loss, Tensor):
        value = loss
    elif callable(loss):
        value = loss(params)
    else:
        raise TypeError(
            "check_second_order: expected a 0-dim tensor or a function that returns one, got "
            f"{type(loss).__name__}"
        )
    if not value.requires_grad:
        raise NotDifferentiableError("check_second_order: the loss has no graph")
    try:
        _reverse_over_reverse(value, list(filter(is_varied, leaves)))
    except NotDifferentiableError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise _missing(error) from error
    if isinstance(loss, Tensor):
        return None
    line = _judge(loss, params)
    if not forward:
        return line.summary(None) if line else None
    slopes = _forward(loss, leaves, spec, line)
    if line is None:
        return None
    if slopes is not None:
        _refuse(line.disagreement(slopes), "forward over reverse mode")
    return line.summary(slopes)


def _forward(
    loss: Callable[[Any], Tensor], leaves: Sequence[Any], spec: Any, line: Line | None
) -> list[float] | None:
    """Return the derivatives along the line by forward mode; None if there is none to compare."""
    try:
        _forward_over_reverse(loss, leaves, spec)
        return None if line is None else line.forward()
    except NotJudgedError as reason:
        _warn_of_values(reason)
    # torch asserts that a Function under vmap has tangents.
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        _warn_of_mode(error)
    return None


def _forward_over_reverse(loss: Callable[[Any], Tensor], leaves: Sequence[Any], spec: Any) -> None:
    """Take a gradient with a tangent as `derivative="mixed"` does."""
    with torch.enable_grad(), forward_mode():
        points = [x.detach().requires_grad_() if is_varied(x) else x for x in leaves]
        varied = list(filter(is_varied, points))
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) if is_varied(x) else x for x in points]
        value = loss(tree_unflatten(spec, duals))
        torch.autograd.grad(value, varied, create_graph=True, allow_unused=True)
