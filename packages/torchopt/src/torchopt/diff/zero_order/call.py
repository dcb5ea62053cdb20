# SPDX-License-Identifier: Apache-2.0
"""One call of a function with an estimated gradient, as an operation of autograd."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchopt.diff.call_state import CallState
from torchopt.diff.closure import ATOMS, captured, hidden_inputs
from torchopt.diff.sealed import draws_outside_torch
from torchopt.diff.zero_order.directions import (
    common_draws,
    draw_seed,
)
from torchopt.diff.zero_order.error_bars import GradientEstimate
from torchopt.diff.zero_order.evaluate import (
    LeafEstimate,
    Sampling,
    estimate_leaves,
    second_derivative,
)
from torchopt.diff.zero_order.evaluator import Evaluator
from torchopt.diff.zero_order.layout import as_real, as_stored, is_perturbed
from torchopt.diff.zero_order.precision import (
    accumulator,
    warn_of_lost_perturbations,
    widened,
)
from torchopt.diff.zero_order.refusals import (
    no_forward_mode,
    no_third_derivative,
    require_no_names,
    require_one_cotangent,
    require_second_derivative,
)
from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import is_wrapped
from torchopt.tree import PyTreeSpec, tree_flatten, tree_unflatten
from torchopt.tree_function import (
    Operation,
    apply_operation,
    is_differentiated,
    is_transforming,
)

if TYPE_CHECKING:
    from torchopt.diff.zero_order.engine import ZeroOrder

__all__ = ["Call", "scalar", "tensor_of"]


def tensor_of(output: Any) -> Tensor:
    """Return an output; raise unless it is a tensor."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"`output` must be a tensor. Got {type(output).__name__}; return it as a tensor, "
            "without .item() or .numpy(), and pass has_aux=True to return more."
        )
    return output


def scalar(output: Any) -> Tensor:
    """Return an output; raise unless it is a 0-dim tensor."""
    tensor = tensor_of(output)
    if tensor.ndim != 0:
        raise RuntimeError(
            f"`output` must be a scalar tensor. Got one of shape {tuple(tensor.shape)}; return "
            "its sum or mean, or pass vector_output=True."
        )
    return tensor


class Call:
    """One call of a decorated function: its arguments split into leaves, and its operation."""

    def __init__(
        self,
        engine: ZeroOrder,
        fn: Callable[..., Any],
        evaluator: Evaluator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        perturbed: Callable[..., Any] | None = None,
        scratch: tuple[Tensor, ...] = (),
    ) -> None:
        self.engine = engine
        self.fn = fn
        self.evaluator = evaluator
        self.perturbed = perturbed
        self.scratch = scratch
        self.seed: int | None = None
        # Whether a derivative may be needed, and the grad mode in which the function runs.
        self.graph = torch.is_grad_enabled()
        self.state: CallState | None = None
        self.overwritten: dict[int, Tensor | None] = {}
        self.complex_output = False
        self.aux_spec: PyTreeSpec | None = None
        self.aux_leaves: list[Any] = []
        assert isinstance(engine.argnums, tuple)
        count = len(args)
        for i in engine.argnums:
            if not -count <= i < count:
                raise ValueError(
                    f"`argnums`: expected positions of the {count} positional arguments, got {i}. "
                    "Pass differentiated arguments by position."
                )
        argnums = [i % count for i in engine.argnums]
        if len(set(argnums)) != len(argnums):
            raise ValueError(
                f"`argnums`: expected different positions of the {count} positional arguments, got "
                f"{engine.argnums}."
            )
        self.flat: list[Any]
        self.flat, self.spec = tree_flatten((args, kwargs))
        self.leaves: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.slots: list[tuple[int, int]] = []  # (position in flat, index into leaves/constants)
        self.constant_slots: list[tuple[int, int]] = []
        parts = [tree_flatten(arg) for arg in args]
        ends = [0]
        for leaves, _ in parts:
            ends.append(ends[-1] + len(leaves))
        wanted = {k for i in argnums for k in range(ends[i], ends[i + 1])}
        self.specs = [(parts[i][1], range(ends[i], ends[i + 1])) for i in argnums]
        held = [x for x in self.flat if not isinstance(x, (Tensor, *ATOMS))]
        self.reached = list(captured(fn, object))
        others = captured((perturbed, held), object) if perturbed or held else ()
        self.draws_outside = draws_outside_torch(itertools.chain(self.reached, others))
        for k, leaf in enumerate(self.flat):
            if not isinstance(leaf, Tensor):
                continue
            if k in wanted and is_perturbed(leaf):
                self.slots.append((k, len(self.leaves)))
                self.leaves.append(as_real(leaf))
            else:
                self.constant_slots.append((k, len(self.constants)))
                self.constants.append(leaf)
        if not self.leaves:
            raise ValueError(
                f"`argnums`: expected floating-point tensors in the arguments at {engine.argnums}, "
                "found none."
            )

    def begin(self) -> None:
        """Record the current surroundings of the function."""
        leaves = (self.flat[k] for k, _ in self.slots)
        given = [*leaves, *self.scratch, *(self.constants if self.graph else ())]
        self.state = CallState(self.fn, given, self.constants, self.reached)
        self.reached = []

    def reset(self) -> None:
        """Restore the surroundings that the function had when the call began."""
        if self.state is not None:
            self.state.reset()

    def running(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the function can run again and leaves no trace."""
        return contextlib.nullcontext() if self.state is None else self.state.held()

    def name(self, leaf: int) -> str:
        """Return the path of a differentiated leaf, such as `$[0]['w']`."""
        k = self.slots[leaf][0]
        return self.spec.accessors()[k][1:].codify("$")

    def warn_of_lost_perturbations(self, leaves: Sequence[Tensor]) -> None:
        """Warn if sigma is below the spacing of floating-point numbers at some weights."""
        normal = self.engine.directions.standard_normal
        warn_of_lost_perturbations(leaves, self.engine.sigma, normal, self.name)

    def evaluate(
        self,
        leaves: Sequence[Tensor],
        constants: Sequence[Tensor],
        scratch: tuple[Tensor, ...] | None = None,
    ) -> tuple[Any, Any]:
        """Return output and aux of the function at other tensors.

        With `scratch` these are perturbed points, at which `perturbed` is called instead.
        """
        flat: list[Any] = list(self.flat)
        for k, i in self.slots:
            flat[k] = as_stored(leaves[i], self.flat[k])
        for k, i in self.constant_slots:
            flat[k] = constants[i]
        arguments: Any = tree_unflatten(self.spec, flat)
        args, kwargs = arguments
        with torch.set_grad_enabled(self.graph):
            if self.perturbed is not None and scratch is not None:
                result = self.perturbed(scratch, *args, **kwargs)
            else:
                result = self.fn(*args, **kwargs)
        if not self.engine.has_aux:
            return result, None
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                "has_aux=True: expected the function to return a pair (output, aux), got "
                f"{type(result).__name__}."
            )
        return result

    def tree(self, leaves: Sequence[Tensor]) -> Any:
        """Return leaves as the tree of the differentiated arguments."""
        flat: list[Any] = list(self.flat)
        for k, i in self.slots:
            flat[k] = as_stored(leaves[i], self.flat[k])
        for k, _ in self.constant_slots:
            flat[k] = None
        trees = tuple(tree_unflatten(spec, [flat[k] for k in part]) for spec, part in self.specs)
        return trees[0] if len(trees) == 1 else trees

    def named(self, result: LeafEstimate) -> GradientEstimate:
        """Return an estimate as trees of the differentiated arguments."""
        error = result.standard_error
        return GradientEstimate(
            self.tree(result.gradient),
            None if error is None else self.tree(error),
            result.effective_sample_size,
            result.evaluations,
        )

    def apply(self) -> Any:
        """Return the result of the function, with the estimate as its derivative."""
        self.graph = self.graph or is_transforming()
        if is_transforming():
            self.require_arguments_of_transforms()
        operation = Operation(
            self.forward, None, no_forward_mode, len(self.leaves), self.gradient_operation
        )
        inputs = (*self.leaves, *self.constants)
        plain = not is_transforming() and not any(map(is_wrapped, inputs))
        output, *aux = apply_operation(operation, *inputs, plain=plain)
        if self.complex_output:
            output = torch.view_as_complex(output)
        if not self.engine.has_aux:
            return output
        assert self.aux_spec is not None
        tensors = iter(aux)
        leaves = [
            next(tensors).detach() if isinstance(leaf, Tensor) else leaf for leaf in self.aux_leaves
        ]
        return output, tree_unflatten(self.aux_spec, leaves)

    def require_arguments_of_transforms(self) -> None:
        """Raise if the function can reach a tensor that an enclosing transform differentiates."""
        given = {id(x) for x in self.flat}
        require_no_names(
            name
            for name, x in captured(self.fn, Tensor)
            if id(x) not in given and is_wrapped(x) and is_differentiated(x)
        )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Evaluate at the point itself, and fix the seed of the backward pass."""
        n = len(self.leaves)
        if self.seed is None:
            # Once for each call: the entries of a vmapped call share their directions.
            self.seed = draw_seed(self.engine.generator)
            if self.graph:
                self.begin()
                self.warn_of_lost_perturbations(tensors[:n])
        else:
            self.reset()
        given = [x.detach() for x in tensors]
        copies = [_copy(x) for x in given] if self.graph else given
        versions = [_version(x) for x in given]
        with common_draws(self.sampling().inner_seed, given, outside=self.draws_outside):
            output, aux = self.evaluate(given[:n], given[n:])
        overwritten = {k: x for k, x in enumerate(copies) if _version(given[k]) != versions[k]}
        if self.overwritten and overwritten:
            overwritten = dict.fromkeys(overwritten)  # the entry of a vmap would be unknown
        self.overwritten.update(overwritten)
        if self.state is not None:
            self.state.settle()
        output = tensor_of(output) if self.engine.vector_output else scalar(output)
        if self.graph:
            names = hidden_inputs(output, given, self.fn)
            require_no_names(name for name in names if not name.startswith("a tensor of"))
        self.aux_leaves, self.aux_spec = tree_flatten(aux)
        extra = (leaf for leaf in self.aux_leaves if isinstance(leaf, Tensor))
        # Copies: an output must not be an input, or a view of one.
        return tuple(x.detach().clone() for x in (self.differentiable(output), *extra))

    def differentiable(self, output: Tensor) -> Tensor:
        """Return an output in a dtype that autograd differentiates: real and floating-point."""
        self.complex_output = output.is_complex()
        if output.is_complex() or output.is_floating_point():
            return as_real(output)
        dtype = torch.float32
        for x in self.leaves:
            dtype = torch.promote_types(dtype, x.dtype)
        return output.to(dtype)

    def constants_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the arguments that are not differentiated, as the function found them.

        Those that the function writes to are copies.
        """
        n, m = len(self.leaves), len(self.constants)
        constants = list(tensors[len(tensors) - m :]) if m else []
        for k in range(n, n + m):
            if k in self.overwritten:
                constants[k - n] = self._before(k).clone()
        return constants

    def point_of(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the differentiated leaves as the function found them."""
        return [
            self._before(k) if k in self.overwritten else x
            for k, x in enumerate(tensors[: len(self.leaves)])
        ]

    def _before(self, k: int) -> Tensor:
        copy = self.overwritten[k]
        if copy is None:
            raise NotDifferentiableError(
                "zero-order estimation: the function overwrites one of its arguments, in a call "
                "under vmap or one that is too large to be copied, so that the backward pass "
                "cannot see what the forward pass saw. Clone the argument inside the function."
            )
        return copy

    def gradient_operation(self, outputs: int) -> Operation:
        """Return the operation that maps leaves and cotangents of the outputs to the gradient."""
        n = len(self.leaves)

        def second(*tensors: Tensor) -> tuple[Tensor, ...]:
            return self.second(n, outputs, *tensors)

        def derivative(cotangents: int) -> Operation:
            return Operation(second, None, no_third_derivative, n + outputs + cotangents)

        return Operation(self.backward, None, no_forward_mode, n + outputs, derivative)

    def backward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return an estimate of cotangent' J, the gradient of the scalar <cotangent, output>."""
        n = len(self.leaves)
        leaves, cotangent = self.point_of(tensors), tensors[n]
        require_one_cotangent(cotangent)
        output = self.output(tensors)

        def product(*point: Tensor) -> Tensor:
            value = widened(output(*point))
            return (value * cotangent.to(accumulator(cotangent.dtype))).sum()

        # For a 0-dim loss the estimate itself is multiplied by the cotangent, so that an estimate
        # from shaped losses is linear in the cotangent, too.
        loss, scale = (product, None) if cotangent.ndim else (output, cotangent)
        with self.running():
            result = estimate_leaves(loss, leaves, self.sampling(), scale=scale)
        return tuple(result.gradient)

    def output(self, tensors: Sequence[Tensor]) -> Callable[..., Tensor]:
        """Return a function from leaves and scratch to the real output.

        It runs in the surroundings of the forward pass.
        """
        n = len(self.leaves)

        def output(*point: Tensor) -> Tensor:
            self.reset()
            constants = self.constants_of(tensors)
            return as_real(tensor_of(self.evaluate(point[:n], constants, point[n:])[0]).detach())

        return output

    def second(self, n: int, outputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the derivative of `backward` by leaves and cotangents, in a direction."""
        require_second_derivative(self.engine)
        leaves, cotangent, rest = self.point_of(tensors), tensors[n], tensors[n + 1 : n + outputs]
        tangents = tensors[n + outputs : 2 * n + outputs]
        output = self.output(tensors)
        with self.running():
            product, along = second_derivative(output, leaves, cotangent, tangents, self.sampling())
        return (*product, along, *(torch.zeros_like(x) for x in rest))

    def sampling(self) -> Sampling:
        """Return the settings for the evaluations of this call."""
        assert self.seed is not None
        return self.engine._sampling(self.evaluator, self.seed, self, self.scratch)


# Arguments with more entries than this are not copied before the function runs.
_COPIED = 2**24


def _copy(x: Tensor) -> Tensor | None:
    return x.clone() if x.numel() <= _COPIED else None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
