# SPDX-License-Identifier: Apache-2.0
"""Differentiable operations on lists of tensors. The one module that subclasses
autograd.Function.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchopt.errors import NotDifferentiableError
from torchopt.torch_internals import (
    any_watched,
    below_transforms,
    count_forward_modes,
    in_forward_mode,
    is_batched,
    is_batched_backward,
    is_differentiated,
    is_traced,
    is_tracked,
    is_transforming,
    is_watched,
    plain_entry,
    taken_off_old_vmap,
    with_forward_mode,
)
from torchopt.tree import is_smooth, tree_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


__all__ = [
    "PLAIN",
    "Operation",
    "Rule",
    "Sweep",
    "add_lists",
    "any_watched",
    "apply_operation",
    "apply_rule",
    "apply_sweep",
    "are_plain",
    "below_transforms",
    "derivatives_wanted",
    "forward_modes",
    "is_batched",
    "is_differentiated",
    "is_traced",
    "is_tracked",
    "is_transforming",
    "is_watched",
    "linearize",
    "max_over_batch",
    "placed_like",
    "plain_entry",
]

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
        form_of: From the number of an output to that of an input of the same shape, dtype and
            device. Where it is given, `vjp_kernel` takes None for a cotangent that is zero, and a
            keyword `needed`, n answers to whether the cotangent of an input is wanted: the others
            may be None in what it returns.
        stand_in_of: For an operation whose derivative depends on no input: from the number of an
            input to that of an output of the same shape, dtype and device. No input is kept then;
            in its place the derivative is given the cotangent of that output.
        reference: The same function as `kernel`, made of differentiable torch operations.
        num_inputs: n.
        derivative: For functions without a differentiable reference: from m to the operation that
            stands for the vector-Jacobian product, n + m inputs to n cotangents.
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
            cotangents: m tensors; None for one that is zero, where there is `form_of`.
            constants: As for `reference`.
            needed: Which input cotangents are wanted; the others may be None.
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
            return apply_operation(self.derivative(m), *inputs, *present, *constants)

        def vjp_reference(*tensors: Tensor) -> Tensors:
            def bound(*variables: Tensor) -> Tensors:
                return self.reference(*variables, *tensors[n + m :])

            _, pull = linearize(bound, *tensors[:n])
            return tuple(pull(tuple(tensors[n : n + m])))

        if kernel is None:
            return vjp_reference(*inputs, *present, *constants)
        derivative = Operation(kernel, None, vjp_reference, n + m)
        return apply_operation(derivative, *inputs, *present, *constants)

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
        outputs, pull = linearize(bound, *inputs)
        _, transpose = linearize(pull, tuple(torch.zeros_like(x) for x in outputs))
        return tuple(transpose(dense)[0])


# torch runs the jvp of a Function with forward mode switched off, for all levels, so that a jvp
# inside a jvp would silently be zero. It is switched on again for the outer ones; the tangents of
# the present one are taken off first.


def forward_modes() -> Any:
    """Return a context with forward mode on, inside of a Function, which switches it off."""
    return with_forward_mode(True)


def _require_one_forward_mode(rule: Rule) -> None:
    if count_forward_modes() > 1:
        raise NotDifferentiableError(
            f"{type(rule).__name__}: a forward mode inside a forward mode cannot see the tensors "
            "of a closure. Pass them as arguments (LinearOperator.from_function), or use reverse "
            "mode for one of the two."
        )


def _values(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the tensors without the tangents of the present forward mode; None stays."""
    return tuple(None if x is None else forward_ad.unpack_dual(x, level=0).primal for x in tensors)


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
            inputs, constants = _split(operation, _values(ctx.saved_tensors))
            used = _values(tangents[1 : 1 + len(inputs)])
            return operation.push_forward(inputs, used, constants)

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


def _stand_ins(operation: Operation, cotangents: tuple[Any, ...]) -> Tensors:
    assert operation.stand_in_of is not None
    inputs = map(operation.stand_in_of, range(operation.num_inputs))
    if is_batched_backward(cotangents):  # which cannot be detached
        cotangents = tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in cotangents)
    elif torch.is_grad_enabled():  # nothing is to be sent back through them
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
            no tensor is what a transform left behind: torch is not asked for it.
    """
    if plain:
        return _apply_plain(operation, *tensors)
    if torch.compiler.is_compiling():
        # A Function with a jvp rule cannot be traced; the compiler fuses the reference
        # itself.
        return operation.reference(*tensors)
    outputs: Tensors = _OperationFunction.apply(operation, *tensors)  # type: ignore[no-untyped-call]
    return outputs


# What `Function.apply` calls when it has looked at every tensor for wrappers of transforms.
_apply_plain: Callable[..., Tensors] = getattr(
    super(torch.autograd.Function, _OperationFunction), "apply", _OperationFunction.apply
)

# torch asks for the signature of `forward` in every call, and works it out anew where it is not
# stated: a third of the time of a call on small tensors.
vars(_OperationFunction.forward)["__signature__"] = inspect.signature(_OperationFunction.forward)


FEW = 4  # sums that are taken one by one


class _AddLists(torch.autograd.Function):
    """Sums of pairs, which keep nothing for their derivative."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        return _foreach_add(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        # A sparse one, as of an embedding, is more than the derivatives of the steps before take.
        dense = [c if c is None or c.layout is torch.strided else c.to_dense() for c in cotangents]
        return (*dense, *dense)


def add_lists(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Return the sums of tensors of the same shapes and devices; for use outside of transforms.

    `torch._foreach_add` keeps all its arguments for a derivative that does not need them. A few
    sums are faster one by one: with their derivative, four take 36 us in place of 40.
    """
    out = list(first)
    graph = torch.is_grad_enabled()
    kept: list[int] = []
    plain: list[int] = []
    for i, (a, b) in enumerate(zip(first, second)):
        if not (graph and (a.requires_grad or b.requires_grad)):
            plain.append(i)
        elif a.dtype == b.dtype:
            kept.append(i)
        else:
            out[i] = a + b
    if len(kept) <= FEW:
        for i in kept:
            out[i] = first[i] + second[i]
        kept = []
    for indices, add in ((kept, _AddLists.apply), (plain, _foreach_add)):
        if indices:
            summed = add(*(role[i] for role in (first, second) for i in indices))
            for i, x in zip(indices, summed):
                out[i] = x
    return out


def _foreach_add(*tensors: Tensor) -> Tensors:
    half = len(tensors) // 2
    return tuple(torch._foreach_add(tensors[:half], tensors[half:]))


def linearize(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return what `torch.func.vjp` returns: the value, and cotangent -> cotangents of the primals.

    The zeros for primals that the value does not depend on are made from the primals themselves;
    torch makes them from wrappers of its own, which fails inside of other transforms.
    """

    def with_primals(*inner: Any) -> Any:
        return function(*inner), inner

    (value, _), pull, *_ = torch.func.vjp(with_primals, *primals)
    zeros = tree_map(torch.zeros_like, primals)
    return value, lambda cotangent: pull((cotangent, zeros))


def over_batched(function: Callable[..., Tensors], tensors: Tensors) -> Tensors:
    """Return `function(*tensors)`, where the tensors may belong to the vmap of torch.autograd.

    `torch.autograd.grad(..., is_grads_batched=True)` has a vmap of its own, older than torch.func's
    and with fewer rules: it is taken off, and torch.func's put in its place.
    """
    taken = taken_off_old_vmap(tensors)
    if taken is None:
        return function(*tensors)
    plain, dims, put_back = taken
    if plain is None:
        raise NotDifferentiableError(
            "is_grads_batched=True: expected a backward pass in the thread that asked for it. Use "
            "torch.func.vmap(torch.func.vjp(...)[1]), or a loop."
        )
    batched = torch.func.vmap(function, dims, randomness="same")
    return tuple(put_back(x) for x in batched(*plain))


class Rule(Protocol):
    """A function of tensors whose derivatives are stated by hand, in terms of its results too.

    Where `Operation` derives everything from a differentiable reference, a rule says how a
    derivative follows from the inputs *and the outputs*: the solution of an equation, whatever
    way it was found. `pull_back` and `push_forward` are made of differentiable operations
    (`apply_rule` among them), so every further derivative follows from them.

    Attributes:
        num_differentiable_inputs: The first so many inputs are differentiated, the others are
            constants.
        num_differentiable_outputs: The first so many outputs have derivatives.
        num_kept_inputs: The derivatives see the first so many inputs; the others are not kept, and
            may be changed in place meanwhile.
        needs_its_closure: Its derivatives use tensors that are not inputs. Inside a vmap those are
            gone when a transform around the vmap asks for derivatives, which is refused.
    """

    @property
    def needs_its_closure(self) -> bool: ...  # noqa: D102 - above

    @property
    def num_differentiable_inputs(self) -> int: ...  # noqa: D102 - above

    @property
    def num_kept_inputs(self) -> int: ...  # noqa: D102 - above

    @property
    def num_differentiable_outputs(self) -> int: ...  # noqa: D102 - above

    def evaluate(self, *inputs: Tensor) -> Tensors:
        """Return the outputs. Runs outside of any graph; sees batched tensors under vmap."""

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        """Return the cotangent of each differentiable input.

        Args:
            inputs: Those that are kept.
            outputs: Those that are differentiable.
            cotangents: One for each of these.
        """

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        """Return the tangent of each differentiable output, likewise."""


@dataclass(frozen=True)
class _BatchedRule:
    """`rule` on a batch: each of its three methods under `torch.func.vmap`."""

    rule: Rule
    in_dims: tuple[int | None, ...]
    randomness: str

    @property
    def needs_its_closure(self) -> bool:
        return self.rule.needs_its_closure

    @property
    def num_differentiable_inputs(self) -> int:
        return self.rule.num_differentiable_inputs

    @property
    def num_kept_inputs(self) -> int:
        return self.rule.num_kept_inputs

    @property
    def num_differentiable_outputs(self) -> int:
        return self.rule.num_differentiable_outputs

    def evaluate(self, *inputs: Tensor) -> Tensors:
        batched = torch.func.vmap(self.rule.evaluate, self.in_dims, randomness=self.randomness)
        return tuple(batched(*inputs))

    def pull_back(self, inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
        self._require_no_closure()
        in_dims = self.in_dims[: self.num_kept_inputs]
        batched = torch.func.vmap(self.rule.pull_back, (in_dims, 0, 0), randomness=self.randomness)
        slices = batched(tuple(inputs), tuple(outputs), tuple(cotangents))
        # An input that all entries share receives the cotangents of all of them.
        return tuple(
            x.sum(0) if dim is None else x.movedim(0, dim) for x, dim in zip(slices, self.in_dims)
        )

    def push_forward(self, inputs: Tensors, outputs: Tensors, tangents: Tensors) -> Tensors:
        self._require_no_closure()
        n = self.num_differentiable_inputs
        batched = torch.func.vmap(
            self.rule.push_forward,
            (self.in_dims[: self.num_kept_inputs], 0, self.in_dims[:n]),
            randomness=self.randomness,
        )
        return tuple(batched(tuple(inputs), tuple(outputs), tuple(tangents)))

    def _require_no_closure(self) -> None:
        if self.needs_its_closure:
            raise NotDifferentiableError(
                f"{type(self.rule).__name__}: cannot be differentiated from outside of the vmap "
                "that it ran in, because it uses tensors of a closure and not only arguments. "
                "Pass them as arguments: linear_solve(LinearOperator.from_function(function, "
                "params, like), b, solver) for a linear solve."
            )


class _RuleFunction(torch.autograd.Function):
    """The bridge from `Rule` to autograd: reverse, forward and batched."""

    @staticmethod
    def forward(rule: Rule, *inputs: Tensor) -> Tensors:
        return rule.evaluate(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rule, *tensors = inputs
        ctx.rule = rule
        ctx.num_inputs, ctx.num_outputs = len(tensors), len(output)
        ctx.mark_non_differentiable(*output[rule.num_differentiable_outputs :])
        kept = (*tensors[: rule.num_kept_inputs], *output[: rule.num_differentiable_outputs])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        rule: Rule = ctx.rule
        saved, kept = ctx.saved_tensors, rule.num_kept_inputs
        inputs, outputs = saved[:kept], saved[kept:]
        used = cotangents[: rule.num_differentiable_outputs]
        pulled = over_batched(lambda *c: rule.pull_back(inputs, outputs, c), used)
        constants = ctx.num_inputs - rule.num_differentiable_inputs
        return (None, *pulled, *(None for _ in range(constants)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        rule: Rule = ctx.rule
        # The tangents of this level in a closure cannot be taken off: forward mode stays off then.
        with contextlib.nullcontext() if rule.needs_its_closure else forward_modes():
            if rule.needs_its_closure:
                _require_one_forward_mode(rule)
            saved, kept = _values(ctx.saved_tensors), rule.num_kept_inputs
            inputs, outputs = saved[:kept], saved[kept:]
            given = _values(tangents[1 : 1 + rule.num_differentiable_inputs])
            dense = tuple(
                torch.zeros_like(x) if tangent is None else tangent
                for x, tangent in zip(inputs, given)
            )
            pushed = rule.push_forward(inputs, outputs, dense)
        return (*pushed, *(None for _ in range(ctx.num_outputs - len(pushed))))

    @staticmethod
    def vmap(info: Any, in_dims: Any, rule: Rule, *inputs: Tensor) -> Any:
        outputs = apply_rule(_BatchedRule(rule, tuple(in_dims[1:]), info.randomness), *inputs)
        return outputs, (0,) * len(outputs)


vars(_RuleFunction.forward)["__signature__"] = inspect.signature(_RuleFunction.forward)


def apply_rule(rule: Rule, *inputs: Tensor) -> Tensors:
    """Return the outputs of `rule`, differentiable to any order, batched and in forward mode."""
    outputs: Tensors = _RuleFunction.apply(rule, *inputs)  # type: ignore[no-untyped-call]
    return outputs


class Sweep(Protocol):
    """A computation in many steps that says itself what it keeps for its derivative.

    For use outside of transforms and forward modes. The outputs that are integers are constants.
    """

    def evaluate(self, *inputs: Tensor) -> Tensors:
        """Return the outputs. Runs outside of any graph."""

    def pull_back(
        self, inputs: Tensors, cotangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the cotangent of each input; None stands for zero.

        In grad mode, as a differentiable function of inputs and cotangents.
        """


class _SweepFunction(torch.autograd.Function):
    """The bridge from `Sweep` to autograd."""

    @staticmethod
    def forward(ctx: Any, sweep: Sweep, *inputs: Tensor) -> Tensors:
        outputs = sweep.evaluate(*inputs)
        ctx.sweep = sweep
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in outputs if not is_smooth(x)))
        ctx.save_for_backward(*inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        inputs = ctx.saved_tensors
        given = [i for i, c in enumerate(cotangents) if c is not None]

        def pulled(*present: Tensor) -> Tensors:
            every: list[Tensor | None] = [None] * len(cotangents)
            for i, c in zip(given, present):
                every[i] = c
            found = ctx.sweep.pull_back(inputs, tuple(every))
            where[:] = [i for i, c in enumerate(found) if c is not None]
            return tuple(c for c in found if c is not None)

        where: list[int] = []
        out: list[Tensor | None] = [None] * len(inputs)
        for i, c in enumerate(over_batched(pulled, tuple(c for c in cotangents if c is not None))):
            out[where[i]] = c
        return (None, *out)


def apply_sweep(sweep: Sweep, *inputs: Tensor) -> Tensors:
    """Return the outputs of `sweep`, differentiable to any order."""
    outputs: Tensors = _SweepFunction.apply(sweep, *inputs)  # type: ignore[no-untyped-call]
    return outputs


PLAIN = (Tensor, torch.nn.Parameter)
"""The types whose memory holds their elements; that of a subclass may hold anything."""


def are_plain(*roles: Iterable[Tensor]) -> bool:
    """Return whether torch's operations on lists serve these tensors: no transform or compiler
    follows them, and no subclass has a say.
    """
    return (
        not in_forward_mode()
        and not is_transforming()
        and not is_traced()
        and all(frozenset(PLAIN).issuperset(map(type, role)) for role in roles)
    )


def placed_like(old: Any, new: Any) -> Tensor:
    """Return `new`, to be written into `old`: if they are DTensors, on the ranks where `old` is."""
    placements = getattr(old, "placements", None)
    if placements is not None and getattr(new, "placements", placements) != placements:
        new = new.redistribute(placements=placements)
    placed: Tensor = new
    return placed


def derivatives_wanted() -> bool:
    """Return whether anybody may differentiate what is computed now."""
    return torch.is_grad_enabled() or in_forward_mode() or is_transforming()


class _MaxOverBatch(torch.autograd.Function):
    """The identity; under vmap, the maximum over the entries of the batch."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        return None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return max_over_batch(x.amax(in_dims[0])), None


def max_over_batch(x: Tensor) -> Tensor:
    """Return a 0-dim integer `x`, or the largest of the batch under vmap, as an unbatched tensor.

    A loop under vmap may ask it whether any entry of the batch still has work to do.
    """
    if not is_transforming():
        return x
    largest: Tensor = _MaxOverBatch.apply(x)  # type: ignore[no-untyped-call]
    return largest
