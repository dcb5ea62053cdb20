# SPDX-License-Identifier: Apache-2.0
"""Estimated derivatives of inner loops, whose results are trees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.diff.explicit.loop import Explicit, InnerResult
from torchopt.diff.problem import InnerCall
from torchopt.tree import is_smooth, tree_flatten, tree_unflatten

if TYPE_CHECKING:
    from torchopt.diff.zero_order.engine import ZeroOrder

__all__ = ["run_inner", "sampled"]

SMOOTH = object()


def run_inner(engine: ZeroOrder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InnerResult:
    """Return the result of an inner loop; parameters and losses have estimated derivatives."""
    problem = Explicit(engine.loss, engine.optimizer, engine.steps, tasks=engine.tasks)
    inner = InnerCall(engine, args, kwargs)
    if not inner.wanted:
        return problem.run_inner(*args, **kwargs)

    def run(tensors: list[Tensor]) -> tuple[Any, Any]:
        found = inner.run(tensors, problem)
        return (found.params, found.losses), (found.state, found.aux)

    (params, losses), (state, aux) = sampled(engine, run, inner.wanted)
    return InnerResult(params, state, losses, aux)


def sampled(
    engine: ZeroOrder,
    function: Callable[[list[Tensor]], tuple[Any, Any]],
    tensors: list[Tensor],
) -> tuple[Any, Any]:
    """Return the two results of a function, the first with estimated derivatives.

    Args:
        engine: The engine that estimates them.
        function: Maps tensors to two trees.
        tensors: The arguments, which are perturbed.
    """
    one = dataclasses.replace(
        engine, loss=None, optimizer=None, verify=None, argnums=0, vector_output=True, has_aux=True
    )

    def flat(point: list[Tensor]) -> tuple[Tensor, Any]:
        tree, others = function(point)
        leaves, spec = tree_flatten(tree, none_is_leaf=True)
        smooth = [x for x in leaves if is_smooth(x)]
        if any(x.is_complex() for x in smooth):
            raise TypeError(
                "ZeroOrder: expected real parameters of the inner problem, got complex ones."
            )
        vector = torch.cat([x.reshape(-1) for x in smooth])
        kept = [SMOOTH if is_smooth(x) else x for x in leaves]
        return vector, (kept, spec, [(x.shape, x.dtype) for x in smooth], others)

    vector, (kept, spec, forms, others) = one.decorated(flat)(tensors)
    parts = iter(vector.split([shape.numel() for shape, _ in forms]))
    made = iter(p.reshape(shape).to(dtype) for p, (shape, dtype) in zip(parts, forms))
    return tree_unflatten(spec, [next(made) if x is SMOOTH else x for x in kept]), others
