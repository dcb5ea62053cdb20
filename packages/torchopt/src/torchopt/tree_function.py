# SPDX-License-Identifier: Apache-2.0
"""Differentiable operations on lists of tensors. The one module that subclasses
autograd.Function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["Operation", "apply_operation"]

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """A fast body together with the plain torch statement of the same function.

    The value comes from `kernel`, the first vector-Jacobian product from `vjp_kernel`; every
    further derivative, and every forward-mode one, is that of `reference`.
    Each of the three takes, after the tensors named below, the constants: tensors that are not
    differentiated, such as step counts.

    Attributes:
        kernel: n tensors to m tensors. Sees plain tensors only, outside of any graph.
        vjp_kernel: The n inputs followed by m cotangents to n cotangents. Sees plain tensors only.
            None: there is no such kernel, the derivative is that of `reference`.
        reference: The same function as `kernel`, made of differentiable torch operations.
        num_inputs: n.
    """

    kernel: Callable[..., Tensors]
    vjp_kernel: Callable[..., Tensors] | None
    reference: Callable[..., Tensors]
    num_inputs: int

    def pull_back(self, inputs: Tensors, cotangents: Tensors, constants: Tensors) -> Tensors:
        """Return the input cotangents, as a differentiable function of inputs and cotangents."""
        n = self.num_inputs
        m = len(cotangents)

        def vjp_reference(*tensors: Tensor) -> Tensors:
            def bound(*variables: Tensor) -> Tensors:
                return self.reference(*variables, *tensors[n + m :])

            _, pull, *_ = torch.func.vjp(bound, *tensors[:n])
            return tuple(pull(tuple(tensors[n : n + m])))

        if self.vjp_kernel is None:
            return vjp_reference(*inputs, *cotangents, *constants)
        derivative = Operation(self.vjp_kernel, None, vjp_reference, n + m)
        return apply_operation(derivative, *inputs, *cotangents, *constants)

    def push_forward(
        self, inputs: Tensors, tangents: tuple[Tensor | None, ...], constants: Tensors
    ) -> Tensors:
        """Return the output tangents; a tangent of None is zero."""

        def bound(*variables: Tensor) -> Tensors:
            return self.reference(*variables, *constants)

        dense = tuple(
            torch.zeros_like(x) if tangent is None else tangent
            for x, tangent in zip(inputs, tangents)
        )
        # The vector-Jacobian product c -> J' c is linear in c, so its own vector-Jacobian product
        # with v is J v. Unlike a nested forward mode, this works inside every transform.
        outputs, pull, *_ = torch.func.vjp(bound, *inputs)
        _, transpose, *_ = torch.func.vjp(pull, tuple(torch.zeros_like(x) for x in outputs))
        return tuple(transpose(dense)[0])


class _OperationFunction(torch.autograd.Function):
    """The bridge from `Operation` to autograd: reverse, forward and batched."""

    @staticmethod
    def forward(operation: Operation, *tensors: Tensor) -> Tensors:
        return operation.kernel(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        operation, *tensors = inputs
        ctx.operation = operation
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        operation: Operation = ctx.operation
        inputs, constants = _split(operation, ctx.saved_tensors)
        return (
            None,
            *operation.pull_back(inputs, cotangents, constants),
            *(None for _ in constants),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        operation: Operation = ctx.operation
        inputs, constants = _split(operation, ctx.saved_tensors)
        return operation.push_forward(inputs, tangents[1 : 1 + len(inputs)], constants)

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: Operation, *tensors: Tensor) -> Any:
        # One call for each batch entry: entries may differ in their constants (the step count) too.
        slices = [
            [x] * info.batch_size if dim is None else list(x.unbind(dim))
            for x, dim in zip(tensors, in_dims[1:])
        ]
        outputs = [apply_operation(operation, *row) for row in zip(*slices)]
        stacked = tuple(torch.stack(column) for column in zip(*outputs))
        return stacked, (0,) * len(stacked)


def _split(operation: Operation, tensors: Tensors) -> tuple[Tensors, Tensors]:
    return tensors[: operation.num_inputs], tensors[operation.num_inputs :]


def apply_operation(operation: Operation, *tensors: Tensor) -> Tensors:
    """Return `operation` of inputs and constants, differentiable to any order, batched and in
    forward mode.
    """
    if torch.compiler.is_compiling():
        # A Function with a jvp rule cannot be traced; the compiler fuses the plain statement
        # itself.
        return operation.reference(*tensors)
    outputs: Tensors = _OperationFunction.apply(operation, *tensors)  # type: ignore[no-untyped-call]
    return outputs
