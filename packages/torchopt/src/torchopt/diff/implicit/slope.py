# SPDX-License-Identifier: Apache-2.0
"""The gradient of a loss as a function whose derivative comes from differences of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchopt.diff.closure import require_arguments
from torchopt.diff.differences import Judge
from torchopt.diff.surroundings import Surroundings
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import is_batched
from torchopt.tree_function import apply_rule, is_transforming

__all__ = ["slope"]

Tensors = tuple[Tensor, ...]


def slope(
    loss: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor], count: int, judge: Judge
) -> Tensors:
    """Return the gradient of a loss with respect to the first `count` tensors.

    Its derivative in reverse mode is computed from gradients of the loss. A second derivative and
    forward mode raise.
    """
    return apply_rule(_Slope(loss, count, len(tensors), judge), *tensors)


@dataclass(frozen=True)
class _Slope:
    """The rule (x, theta) -> dL/dx."""

    loss: Callable[[Sequence[Tensor]], Tensor]
    count: int
    num_differentiable_inputs: int
    judge: Judge
    seen: list[Surroundings] = field(default_factory=list)  # of the loss in `evaluate`

    needs_its_closure = False

    @property
    def num_kept_inputs(self) -> int:
        return self.num_differentiable_inputs

    @property
    def num_differentiable_outputs(self) -> int:
        return self.count

    def evaluate(self, *inputs: Tensor) -> Tensors:
        _require_one(inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        self.seen[:] = [Surroundings(self.loss, inputs).retaken()]
        with torch.enable_grad():
            value = self.loss(leaves)
            require_arguments(value, leaves, self.loss, "Implicit")
        return self._gradient(value, leaves[: self.count])

    @staticmethod
    def _gradient(value: Tensor, at: Sequence[Tensor]) -> Tensors:
        found = torch.autograd.grad(value, at, allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(at, found))

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        _require_one((*inputs, *cotangents))
        if is_transforming():
            _refuse()
        leaves = [x.detach().requires_grad_() for x in inputs]
        at, rest = leaves[: self.count], leaves[self.count :]

        def gradient(moved: Sequence[Any], weight: Tensor) -> tuple[Tensor, Tensors]:
            with torch.enable_grad(), self.seen[0].replayed():
                value = self.loss([*moved, *rest])
                weighted = value * weight.to(value.dtype)
                return weighted, self._gradient(weighted, leaves)

        center = [g.detach() for g in outputs]
        directions = [c.detach() for c in cotangents]
        product = self.judge.differences.product(gradient, at, directions, center)
        self.judge.note(product, product.value)
        self.judge.settle()
        found = tuple(x for x in product.value if x is not None)
        return apply_rule(_Constant(found), *inputs, *cotangents)

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> NoReturn:
        _refuse()


@dataclass(frozen=True)
class _Constant:
    """The rule (inputs) -> values that depend on the inputs but cannot be differentiated."""

    values: Tensors

    needs_its_closure = False
    num_kept_inputs = 0

    @property
    def num_differentiable_inputs(self) -> int:
        return 2 * len(self.values)

    @property
    def num_differentiable_outputs(self) -> int:
        return len(self.values)

    def evaluate(self, *inputs: Tensor) -> Tensors:
        return tuple(x.clone() for x in self.values)

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> NoReturn:
        _refuse()

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> NoReturn:
        _refuse()


def _require_one(tensors: Sequence[Tensor]) -> None:
    if any(map(is_batched, tensors)):
        raise NotDifferentiableError(
            "Implicit: derivative='differences': expected one product at a time, whose error is "
            "checked, got a vmap of them: use a matrix-free solver, such as CG() or Neumann(), "
            "and loop over tasks; or use derivative='reverse'."
        )


def _refuse() -> NoReturn:
    raise NotDifferentiableError(
        "Implicit: derivative='differences': expected one derivative, in reverse mode: differences "
        "of gradients have no derivative of their own. Use derivative='reverse'."
    )
