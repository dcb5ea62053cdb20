# SPDX-License-Identifier: Apache-2.0
"""Operations: a kernel together with the reference implementation of the same function."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.precision import without_autocast
from torchopt.torch_internals import (
    any_watched,
    entries_of_batch,
    is_batched_backward,
    is_transforming,
)
from torchopt.tree_function.modes import Tensors, forward_modes, linearize, values

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Operation", "apply_operation"]


@dataclass(frozen=True)
class Operation:
    """A kernel together with the reference implementation of the same function in torch.

    The value comes from `kernel`, the first vector-Jacobian product from `vjp_kernel`. Higher
    derivatives and derivatives in forward mode are those of `reference`.
    Each of the three takes, after the tensors named below, the constants: tensors that are not
    differentiated, such as step counts.

    Attributes:
        kernel: Maps n tensors to m tensors. It gets plain tensors, outside of any graph.
        vjp_kernel: Maps the n inputs followed by m cotangents to n cotangents. It gets plain
            tensors. None: the derivative is that of `reference`.
        form_of: Maps the number of an output to that of an input of the same shape, dtype and
            device. If it is given, `vjp_kernel` accepts None for a cotangent that is zero, and a
            keyword `needed`, which says for each of the n inputs whether its cotangent is needed;
            the others may be None in the result.
        stand_in_of: For an operation whose derivative depends on no input: maps the number of an
            input to that of an output of the same shape, dtype and device. No input is then saved;
            the derivative gets the cotangent of that output instead.
        reference: The same function as `kernel`, made of differentiable torch operations.
        num_inputs: n.
        derivative: For functions without a differentiable reference: maps m to the operation that
            computes the vector-Jacobian product, from n + m inputs to n cotangents.
    """

    kernel: Callable[..., Tensors]
    vjp_kernel: Callable[..., tuple[Any, ...]] | None
    reference: Callable[..., Tensors]
    num_inputs: int
    derivative: Callable[[int], Operation] | None = None
    form_of: Callable[[int], int] | None = None
    stand_in_of: Callable[[int], int] | None = None

    def pull_back(
        self,
        inputs: Tensors,
        cotangents: tuple[Tensor | None, ...],
        constants: Tensors,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Return the input cotangents, as a differentiable function of inputs and cotangents.

        Args:
            inputs: n tensors.
            cotangents: m tensors; with `form_of`, None for one that is zero.
            constants: As for `reference`.
            needed: Which input cotangents are needed; the others may be None.
        """
        n = self.num_inputs
        m = len(cotangents)
        present = tuple(x for x in cotangents if x is not None)
        batched = is_batched_backward(present)
        kernel = None if batched else self.vjp_kernel
        if kernel is not None and not any_watched((*inputs, *present, *constants)):
            with torch.no_grad():
                if self.form_of is None:
                    return kernel(*inputs, *present, *constants)
                return kernel(*inputs, *cotangents, *constants, needed=needed)
        if self.form_of is not None:
            form_of = self.form_of
            present = tuple(
                torch.zeros_like(inputs[form_of(k)]) if x is None else x
                for k, x in enumerate(cotangents)
            )
        if self.derivative is not None:
            tensors = (*inputs, *present, *constants)
            derivative = self.derivative(m)
            if batched or is_transforming() or any_watched(tensors):
                return apply_operation(derivative, *tensors)
            with torch.no_grad():
                return derivative.kernel(*tensors)

        def vjp_reference(*tensors: Tensor) -> Tensors:
            def bound(*variables: Tensor) -> Tensors:
                return self.reference(*variables, *tensors[n + m :])

            with without_autocast():  # as in the step, wherever its derivative is taken
                _, pull = linearize(bound, *tensors[:n])
                return tuple(pull(tuple(tensors[n : n + m])))

        if kernel is None:
            return vjp_reference(*inputs, *present, *constants)
        of_kernel = Operation(kernel, None, vjp_reference, n + m)
        return apply_operation(of_kernel, *inputs, *present, *constants)

    def push_forward(
        self, inputs: Tensors, tangents: tuple[Tensor | None, ...], constants: Tensors
    ) -> Tensors:
        """Return the output tangents; an input tangent of None is zero."""

        def bound(*variables: Tensor) -> Tensors:
            return self.reference(*variables, *constants)

        dense = tuple(
            torch.zeros_like(x) if tangent is None else tangent
            for x, tangent in zip(inputs, tangents)
        )
        # The vector-Jacobian product c -> J^T c is linear in c, so its own vector-Jacobian product
        # with v is J v. Unlike a nested forward mode, this works inside every transform.
        outputs, pull = linearize(bound, *inputs)
        _, transpose = linearize(pull, tuple(torch.zeros_like(x) for x in outputs))
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
        constant = operation.stand_in_of is not None
        ctx.set_materialize_grads(constant or operation.form_of is None)
        ctx.save_for_backward(*(tensors[operation.num_inputs :] if constant else tensors))
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        operation: Operation = ctx.operation
        if operation.stand_in_of is None:
            inputs, constants = _split(operation, ctx.saved_tensors)
        else:
            inputs, constants = _stand_ins(operation, cotangents), ctx.saved_tensors
        needed = ctx.needs_input_grad[1 : 1 + len(inputs)]
        return (
            None,
            *operation.pull_back(inputs, cotangents, constants, needed),
            *(None for _ in constants),
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        operation: Operation = ctx.operation
        with forward_modes():
            inputs, constants = _split(operation, values(ctx.saved_tensors))
            used = values(tangents[1 : 1 + len(inputs)])
            return operation.push_forward(inputs, used, constants)

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: Operation, *tensors: Tensor) -> Any:
        # One call per batch entry, because the constants (the step count) may differ as well. For a
        # batch without entries, one call on zeros shows the shapes.
        size = info.batch_size
        slices = [
            [x] * max(size, 1) if dim is None else entries_of_batch(x, dim)
            for x, dim in zip(tensors, in_dims[1:])
        ]
        outputs = [apply_operation(operation, *row) for row in zip(*slices)]
        stacked = tuple(torch.stack(column) for column in zip(*outputs))
        stacked = stacked if size else tuple(x[:0] for x in stacked)
        return stacked, (0,) * len(stacked)


def _stand_ins(operation: Operation, cotangents: tuple[Any, ...]) -> Tensors:
    assert operation.stand_in_of is not None
    inputs = map(operation.stand_in_of, range(operation.num_inputs))
    if is_batched_backward(cotangents):  # batched cotangents cannot be detached
        cotangents = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in cotangents)
    elif torch.is_grad_enabled():  # no gradient flows back through them
        cotangents = tuple(x.detach() for x in cotangents)
    return tuple(cotangents[k] for k in inputs)


def _split(operation: Operation, tensors: Tensors) -> tuple[Tensors, Tensors]:
    return tensors[: operation.num_inputs], tensors[operation.num_inputs :]


def apply_operation(operation: Operation, *tensors: Tensor, plain: bool = False) -> Tensors:
    """Return `operation` of inputs and constants, differentiable to any order, batched and in
    forward mode.

    Args:
        operation: The operation.
        tensors: Inputs and constants.
        plain: Whether it is known that nothing is compiled, that no transform is active and that
            no tensor is a wrapper left by a transform. The checks of torch are then skipped.
    """
    if plain:
        return _apply_plain(operation, *tensors)
    if torch.compiler.is_compiling():
        # A Function with a jvp rule cannot be traced; the compiler fuses the reference instead.
        return operation.reference(*tensors)
    outputs: Tensors = _OperationFunction.apply(operation, *tensors)  # type: ignore[no-untyped-call]
    return outputs


# The function that `Function.apply` calls after it has checked all tensors for wrappers.
_apply_plain: Callable[..., Tensors] = getattr(
    super(torch.autograd.Function, _OperationFunction), "apply", _OperationFunction.apply
)

# torch asks for the signature of `forward` in every call. Without this line it is computed anew,
# which takes a third of the time of a call on small tensors.
vars(_OperationFunction.forward)["__signature__"] = inspect.signature(_OperationFunction.forward)
